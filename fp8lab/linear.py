"""`Fp8Linear`: a linear layer whose three GEMMs take operands cast as a recipe says.

    output      = cast(input)       @ cast(weight)^T         [tokens, out]
    grad_input  = cast(grad_output) @ cast(weight)           [tokens, in]
    grad_weight = cast(grad_output)^T @ cast(input)          [out, in]

As in Transformer Engine an operand is cast once where both of its GEMMs can use the same codes,
and twice, along the one axis and along the other, where what shares a scale lies along what a GEMM
sums (blocks, rows). Inputs and weights are cast for the backward pass in the forward pass already.

The GEMMs run in FP32 on dequantised values. Hardware multiplies the codes, exactly, and scales the
sum; here each operand and each product is rounded to FP32 first, by at most 2^-24 of itself, and
the order and width of the accumulation are FP32's, unless an `Accumulation` says otherwise.
Parameters keep their dtype, as master weights; the output has the dtype of the input, but for the
layers around a fused product. Float32 copies of input and weight are saved for the backward pass,
where an unconverted layer saves them as they are.

Delayed scales move when a step ends, which `regions` decides. The state is in two buffers named as
TE names them, one column per operand (input, weight, grad_output) and in `scale` two more where a
format has copies of input and weight for the backward pass. Row 0 is filled when the step ends:
DistributedDataParallel gives every rank the buffers of rank 0, before each forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab import kernels
from fp8lab.accumulation import error_of_sums, multiply_in_steps
from fp8lab.casting import Cast, FusedProduct, cast_for, rotated_back
from fp8lab.formats import FloatFormat
from fp8lab.recipe import (
    GEMMS,
    OPERANDS,
    Accumulation,
    DelayedScaling,
    Direction,
    Float8CurrentScaling,
    Gemm,
    NVFP4BlockScaling,
    Operand,
    Recipe,
    check_recipes,
    direction_of,
    operand_format,
    recipe_in_words,
)
from fp8lab.regions import register, steps
from fp8lab.rewriting import OfAnotherForwardError, Rewrite
from fp8lab.rounding import ROUNDED_ONCE
from fp8lab.scaling import absolute_maximum, is_the_same_both_ways, matrix_shape, scale_for


class Fp8Linear(nn.Linear):
    """An `nn.Linear` with emulated low-precision GEMMs.

    `recipes` gives each operand its recipe and may be changed between steps (but not to
    `DelayedScaling` where there was none: its history is allocated at birth); `gemm_recipes` does
    so for an operand of one GEMM. `rewrite` makes other operands of input and weight, whose product
    is the same, before either is cast (see `rewriting`).
    `gradient_of_saturated` says what an input element that saturated receives: its gradient
    ("straight_through", as TE) or none ("zero"). `product_in` and `product_out` are set on the
    layers around a product that is fused as in TE.

    Known limits, with activation checkpointing: of two forwards, each its own region, before their
    two backwards, the first is repeated with the second's scales; and an evaluation through
    use_reentrant=True counts as training unless its region was opened without gradients.

    Raises ValueError for delayed scaling of an operand in one GEMM alone: it has one history.
    """

    amax_history: Tensor
    scale: Tensor
    _scale_before: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipes: Mapping[Operand, Recipe],
        gemm_recipes: Mapping[tuple[Operand, Gemm], Recipe] | None = None,
        accumulation: Accumulation | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        check_recipes(recipes, gemm_recipes or {}, "Fp8Linear")
        self._set_up(recipes, gemm_recipes or {}, accumulation)

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        recipes: Mapping[Operand, Recipe],
        gemm_recipes: Mapping[tuple[Operand, Gemm], Recipe] | None = None,
        accumulation: Accumulation | None = None,
    ) -> Fp8Linear:
        """Turn a layer into an `Fp8Linear` in place: its parameters, hooks and every reference to
        it, an optimizer's included, stay what they are."""
        check_recipes(recipes, gemm_recipes or {}, "Fp8Linear")
        linear.__class__ = cls
        cast(Fp8Linear, linear)._set_up(recipes, gemm_recipes or {}, accumulation)
        return cast(Fp8Linear, linear)

    def _set_up(
        self,
        recipes: Mapping[Operand, Recipe],
        gemm_recipes: Mapping[tuple[Operand, Gemm], Recipe],
        accumulation: Accumulation | None,
    ) -> None:
        self.recipes = dict(recipes)
        # A delayed one is the operand's own, and stays that.
        self.gemm_recipes = {k: r for k, r in gemm_recipes.items() if type(r) is not DelayedScaling}
        self.accumulation = accumulation
        self.rewrite: Rewrite | None = None
        self._running: dict[Operand, Tensor] = {}  # amaxes of this step, float32 []
        self.gradient_of_saturated: Literal["straight_through", "zero"] = "straight_through"
        self.product_in: FusedProduct | None = None
        self.product_out: FusedProduct | None = None
        delayed = [r for r in recipes.values() if isinstance(r, DelayedScaling)]
        if delayed:
            length = max(recipe.amax_history_len for recipe in delayed)
            columns = 5 if any(recipe.fp8_format.has_copies for recipe in delayed) else 3
            # Whatever torch's default dtype is.
            ones = torch.ones(columns, device=self.weight.device, dtype=torch.float32)
            self.register_buffer("amax_history", ones.new_zeros(length, 3))
            self.register_buffer("scale", ones)
            self.register_buffer("_scale_before", ones.clone(), persistent=False)
            register(self)

    def extra_repr(self) -> str:
        casts = [f"{o}={type(r).__name__}" for o, r in self.recipes.items()]
        casts += [f"{o}@{g}={type(r).__name__}" for (o, g), r in self.gemm_recipes.items()]
        accumulation = "" if self.accumulation is None else f", {self.accumulation}"
        return f"{super().extra_repr()}, {', '.join(casts)}{accumulation}"

    @property
    def has_delayed_scales(self) -> bool:
        return "amax_history" in self._buffers

    def recipe_for(self, operand: Operand, gemm: Gemm) -> Recipe:
        """The recipe in force for an operand of one GEMM."""
        return self.gemm_recipes.get((operand, gemm), self.recipes[operand])

    def format_for(self, operand: Operand, gemm: Gemm) -> FloatFormat:
        """The element format of an operand of one GEMM."""
        recipe = self.recipe_for(operand, gemm)
        return operand_format(recipe, operand, self._direction(operand, gemm))

    def precision(self) -> dict[str, str]:
        """What each operand of each GEMM is cast to (`input@grad_weight`): its format, its recipe,
        what is put on top, and how the GEMM sums if not in FP32."""
        uses: dict[str, str] = {}
        for gemm, operands in GEMMS.items():
            short = self.accumulation if self._is_short(gemm) else None
            for operand in operands:
                recipe, fmt = self.recipe_for(operand, gemm), self.format_for(operand, gemm)
                uses[f"{operand}@{gemm}"] = f"{fmt.name} {recipe_in_words(recipe)}"
                if short is not None:
                    uses[f"{operand}@{gemm}"] += f", summed in {short.bits} bits"
                if operand == "input" and self.rewrite is not None:
                    uses[f"{operand}@{gemm}"] += f", {self.rewrite.words}"
        if self.gradient_of_saturated == "zero":
            uses["input@output"] += ", no gradient where saturated"
        return uses

    def _direction(self, operand: Operand, gemm: Gemm) -> Direction:
        # What is cast once is cast rowwise.
        once = not self.is_cast_twice(operand)
        return "rowwise" if once else direction_of(operand, gemm)

    def is_cast_twice(self, operand: Operand) -> bool:
        """Whether the operand's two GEMMs take different codes of it."""
        first, second = (gemm for gemm, operands in GEMMS.items() if operand in operands)
        recipe, other = self.recipe_for(operand, first), self.recipe_for(operand, second)
        differ = recipe is not other and recipe != other  # `is` first: comparing costs
        return differ or not is_the_same_both_ways(recipe, operand)

    def cast_in_force(self, operand: Operand, tensor: Tensor, gemm: Gemm | None = None) -> Cast:
        """How this layer casts `tensor` now, rewritten first if it is to be, for the first of the
        operand's GEMMs unless another is given; changes no codes."""
        scale, rewrite = None, self.rewrite
        if rewrite is not None and operand == "input":
            tensor, _, scale, _ = rewrite(tensor, self.weight)
        elif rewrite is not None and operand == "weight":
            tensor = rewrite.of_weight(tensor)
        elif rewrite is not None and (of_output := rewrite.output_scale) is not None:
            if of_output.shape[:-1] != tensor.shape[:-1]:
                raise OfAnotherForwardError("Fp8Linear: a gradient of an earlier forward")
            scale = of_output.expand_as(tensor)
            tensor = (tensor * scale).to(tensor.dtype)  # as autograd makes it
        gemm = gemm or ("grad_input" if operand == "grad_output" else "output")
        return self.cast_as_given(operand, tensor, gemm)._replace(channel_scale=scale)

    def cast_as_given(self, operand: Operand, tensor: Tensor, gemm: Gemm) -> Cast:
        """`cast_in_force` of what is no longer rewritten."""
        recipe, scale = self.recipe_for(operand, gemm), None
        direction = self._direction(operand, gemm)
        if operand == "input" and self.product_in is not None:
            tensor, amax = self.product_in.cast_as(tensor, recipe)
            if amax is not None and isinstance(recipe, Float8CurrentScaling):
                fmt = operand_format(recipe, operand, direction)
                scale = scale_for(amax, fmt, power_of_two=recipe.use_power_2_scales)
        if isinstance(recipe, DelayedScaling):
            moved_since = operand != "grad_output" and steps.repeats_forward_of(self)
            scales = self._scale_before if moved_since else self.scale
            is_copy = direction == "columnwise" and operand != "grad_output"
            copy = 3 if is_copy and recipe.fp8_format.has_copies else 0
            # A copy: what was decided for this cast stays when the layer's own scale moves on.
            scale = scales[OPERANDS.index(operand) + copy].clone()
        return cast_for(tensor, recipe, operand, scale, direction)

    def forward(self, input: Tensor) -> Tensor:
        fused, place = self.product_in and self.product_in.dtype, input.device.type
        if fused is None and input.dtype in ROUNDED_ONCE and torch.is_autocast_enabled(place):
            input = input.to(torch.get_autocast_dtype(place))
        dtype, output_scale, weight = fused or input.dtype, None, self.weight
        if self.rewrite is not None:
            input, weight, _, output_scale = self.rewrite(input, weight)
        bias = self.bias if output_scale is None else None
        inputs = self.cast_as_given("input", input, "output")
        weights = self.cast_as_given("weight", weight, "output")
        counts, graph = steps.forward_counts(), torch.is_grad_enabled()
        with torch.autocast(input.device.type, enabled=False):
            operands = input, weight, bias, inputs, weights
            output: Tensor = _Gemms.apply(*operands, self, dtype, counts, graph)  # type: ignore
        if output_scale is not None:
            added = 0.0 if self.bias is None else self.bias
            output = (output * output_scale + added).to(dtype)
        if counts:
            steps.forward_ran(self)
        if self.product_in is not None:
            self.product_in.dtype = None
        if self.product_out is not None:
            self.product_out.dtype = dtype
            output = output.float()  # whose gradient is thereby rounded as in the model's dtype
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        # `model.bfloat16()` is about parameters: a scale in BF16 would be another scale.
        state = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in state.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A checkpoint from before the conversion has no FP8 state: it starts afresh, as in TE.
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        own = (f"{prefix}amax_history", f"{prefix}scale")
        if not set(own) <= set(missing):
            missing_keys += missing
        elif f"{prefix}weight" in state_dict:
            missing_keys += [key for key in missing if key not in own]
            self.start_afresh(*OPERANDS)
        for name in ("amax_history", "scale"):  # assign=True takes the dtype of the checkpoint
            if (buffer := self._buffers.get(name)) is not None:
                self._buffers[name] = buffer.float()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.start_afresh(*OPERANDS)

    def start_afresh(self, *operands: Operand) -> None:
        """Forget the amaxes and delayed scales of these operands."""
        if not self.has_delayed_scales:
            return
        columns = [OPERANDS.index(operand) for operand in operands]
        self.amax_history[:, columns] = 0.0
        columns += [column + 3 for column in columns if column + 3 < len(self.scale)]
        self.scale[columns] = self._scale_before[columns] = 1.0
        self._running = {o: amax for o, amax in self._running.items() if o not in operands}

    def quantized(self, how: Cast, operand: Operand, counts: bool) -> Tensor:
        """What a GEMM takes of a cast operand, float32 [tokens, features]; its amax enters the
        history if it counts."""
        if counts and isinstance(how.recipe, DelayedScaling):
            values, amax = how.fake_quantized_and_amax()
            self._running[operand] = torch.maximum(self._running.get(operand, amax), amax)
        else:
            values = how.fake_quantized()
        return values.reshape(matrix_shape(values.shape))

    def quantized_again(
        self, operand: Operand, tensor: Tensor, gemm: Gemm, first: Tensor, counts: bool
    ) -> Tensor:
        """The operand for the second of its GEMMs: `first` itself, if one cast does for both."""
        if not self.is_cast_twice(operand):
            return first
        again = self.cast_as_given(operand, tensor, gemm)
        values = self.quantized(again, operand, counts)
        # Turned by a Hadamard transform only where the GEMM's other operand is turned too.
        if again.rotated and not self._both_rotate():
            values = rotated_back(values, len(first))
        return values

    def _both_rotate(self) -> bool:
        recipes = (self.recipe_for(operand, "grad_weight") for operand in GEMMS["grad_weight"])
        return all(isinstance(r, NVFP4BlockScaling) and not r.disable_rht for r in recipes)

    def multiply(
        self, left: Tensor, right: Tensor, gemm: Gemm, bias: Tensor | None = None
    ) -> Tensor:
        """left [m, k] @ right [n, k]^T + bias, float32, accumulated as the layer was told."""
        # Of this GEMM's device: `get_float32_matmul_precision` raises where two of them differ.
        place = torch.backends.cuda if left.is_cuda else torch.backends.mkldnn
        if (found := place.matmul.fp32_precision) not in ("none", "ieee"):
            raise RuntimeError(f"Fp8Linear: float32 matmul precision {found!r}, expected 'ieee'")
        if self.accumulation is None or not self._is_short(gemm):
            return functional.linear(left, right, bias)
        product = multiply_in_steps(left, right.t(), self.accumulation)
        return product if bias is None else product + bias

    def _is_short(self, gemm: Gemm) -> bool:
        # A GEMM with a wide operand runs in BF16, which accumulates in FP32.
        narrow = all(self.format_for(operand, gemm).bits <= 8 for operand in GEMMS[gemm])
        return narrow and self.accumulation is not None and gemm in self.accumulation.gemms

    def gemm_error(self, gemm: Gemm, tensor: Tensor, other: Tensor | None = None) -> Tensor | None:
        """`error_of_sums` of a GEMM (`other`: grad_weight's input), None if they are FP32's."""
        if self.accumulation is None or not self._is_short(gemm):
            return None
        how = self.cast_in_force("input" if gemm == "output" else "grad_output", tensor, gemm)
        left = how.fake_quantized().flatten(0, -2)
        if other is not None:
            right = self.cast_in_force("input", other, gemm).fake_quantized().flatten(0, -2)
            return error_of_sums(left.t(), right, self.accumulation)
        right = self.cast_in_force("weight", self.weight, gemm).fake_quantized()
        return error_of_sums(left, right.t() if gemm == "output" else right, self.accumulation)

    def running_amaxes(self, *operands: Operand) -> list[Tensor]:
        """float32 [], this step's amaxes that all ranks share, to be changed in place."""
        return [
            self._running.setdefault(operand, self.scale.new_zeros(()))
            for operand in operands
            if isinstance(recipe := self.recipes[operand], DelayedScaling) and recipe.reduce_amax
        ]

    @torch.no_grad()
    def move_scales(self, *operands: Operand) -> None:
        """End of a step for these operands: a new scale from the history, and the history rolls.

        Source: TE `delayed_scaling.cu` (bulk kernel): the amax is taken over the last
        `amax_history_len` steps, this one included; a step whose amax is 0 leaves the scale and the
        history as they are. With a function of either kind TE takes another path
        (`_amax_and_scale_update`), which asks it at every step and always rolls.
        """
        for operand in operands:
            recipe, column = self.recipes[operand], OPERANDS.index(operand)
            if not isinstance(recipe, DelayedScaling):
                continue
            if recipe.amax_history_len > len(self.amax_history):
                raise RuntimeError(
                    f"DelayedScaling: amax_history_len={recipe.amax_history_len}, expected at most "
                    f"the {len(self.amax_history)} steps that the layer was converted with"
                )
            if (running := self._running.pop(operand, None)) is not None:
                self.amax_history[0, column] = running
            if self._moved_by_kernel(recipe, operand):
                continue
            history = self.amax_history[: recipe.amax_history_len, column]
            amax, rolled = _amax_and_rolled(history, recipe)
            self._move(column, amax, recipe, operand_format(recipe, operand))
            if operand != "grad_output" and recipe.fp8_format.has_copies:
                self._move(column + 3, amax, recipe, operand_format(recipe, operand, "columnwise"))
            history.copy_(rolled)
            history[0] = 0.0

    def renew_scale(self) -> None:
        """Make the delayed scale of the weight that of the weight as it is: it has been rewritten,
        and no amax in the history is of it."""
        recipe = self.recipes["weight"]
        if isinstance(recipe, DelayedScaling):
            column, amax = OPERANDS.index("weight"), absolute_maximum(self.weight.detach())
            self._move(column, amax, recipe, operand_format(recipe, "weight"))
            if recipe.fp8_format.has_copies:
                self._move(column + 3, amax, recipe, operand_format(recipe, "weight", "columnwise"))

    def _moved_by_kernel(self, recipe: DelayedScaling, operand: Operand) -> bool:
        told = recipe.amax_compute_algo, recipe.scaling_factor_compute_algo
        special = any(callable(algorithm) for algorithm in told) or recipe.fp8_format.has_copies
        if special or not kernels.usable(self.amax_history):
            return False
        kernels.move_scale(
            self.amax_history,
            OPERANDS.index(operand),
            recipe.amax_history_len,
            operand_format(recipe, operand).max * 2.0**-recipe.margin,
            recipe.amax_compute_algo == "most_recent",
            self.scale,
            self._scale_before,
        )
        return True

    def _move(self, column: int, amax: Tensor, recipe: DelayedScaling, fmt: FloatFormat) -> None:
        old = self.scale[column].clone()
        self._scale_before[column] = old
        compute = recipe.scaling_factor_compute_algo
        if compute is None:
            self.scale[column] = scale_for(amax, fmt, margin=recipe.margin, previous=old)
        else:
            self.scale[column] = compute(amax, old, torch.full_like(old, fmt.max), recipe)


def _amax_and_rolled(history: Tensor, recipe: DelayedScaling) -> tuple[Tensor, Tensor]:
    """The amax that makes the next scale, float32 [], and the history as it is then."""
    rolled, latest = history.roll(-1), history[0]
    if callable(recipe.amax_compute_algo):
        return recipe.amax_compute_algo(history), rolled
    most_recent = recipe.amax_compute_algo == "most_recent"
    amax = latest if most_recent else absolute_maximum(history)
    if recipe.scaling_factor_compute_algo is not None:
        return amax, rolled
    return torch.where(latest == 0, latest, amax), torch.where(latest == 0, history, rolled)


class _Gemms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: Cast,
        weights: Cast,
        layer: Fp8Linear,
        dtype: torch.dtype,
        counts: bool,
        graph: bool,
    ) -> Tensor:
        quantized_input = layer.quantized(inputs, "input", counts)
        quantized_weight = layer.quantized(weights, "weight", counts)
        wide_bias = None if bias is None else bias.float()
        output = layer.multiply(quantized_input, quantized_weight, "output", wide_bias)
        saved: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[1] and graph:  # without a graph they say so all the same
            saved[0] = layer.quantized_again("input", input, "grad_weight", quantized_input, counts)
        if ctx.needs_input_grad[0] and graph:
            saved[1] = layer.quantized_again(
                "weight", weight, "grad_input", quantized_weight, counts
            )
        if layer.gradient_of_saturated == "zero":
            saved[2] = inputs.saturated()
        ctx.save_for_backward(*saved)
        ctx.layer, ctx.dtypes, ctx.shape = layer, (input.dtype, weight.dtype), input.shape
        ctx.dtype, ctx.is_fused = dtype, layer.product_in is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        shape = (*input.shape[:-1], layer.out_features)  # no `view`: ReLU(inplace=True) may follow
        return cast(Tensor, torch.ops.aten._unsafe_view(output.to(dtype), shape))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: a second derivative would be missing
            raise RuntimeError("Fp8Linear: create_graph=True, expected False: it has no second one")
        quantized_input, quantized_weight, saturated = ctx.saved_tensors
        layer: Fp8Linear = ctx.layer
        gradient = layer.cast_as_given("grad_output", grad_outputs[0], "grad_input")
        quantized = layer.quantized(gradient, "grad_output", counts=True)
        steps.backward_ran(layer)
        grad_input = grad_weight = grad_bias = None
        # A backward that is called inside torch's autocast would run these GEMMs in BF16.
        with torch.autocast(quantized.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_input = layer.multiply(quantized, quantized_weight.t(), "grad_input")
                grad_input = grad_input.view(ctx.shape)
                if saturated is not None:
                    grad_input.masked_fill_(saturated, 0.0)
                if ctx.is_fused:  # of a fused product: as in the model's dtype
                    grad_input = grad_input.to(ctx.dtype)
                grad_input = grad_input.to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                again = layer.quantized_again(
                    "grad_output", grad_outputs[0], "grad_weight", quantized, counts=True
                )
                grad_weight = layer.multiply(again.t(), quantized_input.t(), "grad_weight")
                grad_weight = grad_weight.to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            # Not a GEMM: TE sums the bias gradient from the unquantised gradient.
            unquantized = grad_outputs[0].reshape(matrix_shape(grad_outputs[0].shape))
            grad_bias = unquantized.float().sum(0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None, None
