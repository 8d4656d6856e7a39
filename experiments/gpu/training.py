"""A language model of a hundred million parameters trained by Transformer Engine, four times.

BF16, FP8 with delayed scaling, FP8 with current scaling, and delayed scaling with Smooth-SwiGLU,
from the same weights on the same bytes (the running Python's own standard library); losses, step
times, and what `fp8lab.diagnose` finds in the recorded runs. Weights are BF16 for TE, with FP32
masters that AdamW moves.

Llama's shape: RMSNorm, rotary attention without biases, te.LayerNormMLP with SwiGLU. In the fourth
arm the feed-forward is three te.Linear: `fp8lab.mitigations.SmoothSwiGLU` rewrites fp8lab's own
layers and refuses TE's, so the paper's algorithm, a scale per channel of the product and its
inverse in down's columns, is written here around TE's down projection, which is cast just in time
(a weight that changes with every step's scales cannot be cast by old ones). Gate, up and their
casts are then not TE's fused kernel, so step times of that arm say what this form costs, not what a
kernel would; nor is it watched, for fp8lab knows the products of its own mitigations alone.

A few hundred steps show that it trains and what it costs. A divergence as in the paper's takes two
hundred billion tokens.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
import torch
import torch.nn.functional as F
from suite import Page, Setting, last_line
from torch import Tensor, nn

TITLE = "A model of 100 M parameters, trained by Transformer Engine"


@dataclass(frozen=True)
class Sizes:
    """Of the model and of its batches."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 2560
    context: int = 512
    batch: int = 16
    steps: int = 300


TINY = Sizes(layers=2, width=32, heads=2, hidden=48, context=16, batch=2, steps=3)
NEEDED_TO_WATCH = ("numpy", "pandas", "pyarrow")


def run(setting: Setting, page: Page) -> None:
    """The table of this part: a row an arm."""
    te, sizes = engine.load(setting.rehearsal), setting.pick(Sizes(), TINY)
    data = standard_library(setting.device)
    recipes = engine.recipes()
    delayed = recipes.DelayedScaling(amax_history_len=16)
    arms: dict[str, tuple[Any, bool]] = {
        "BF16": (None, False),
        "FP8, delayed": (delayed, False),
        "FP8, current": (recipes.Float8CurrentScaling(), False),
        "FP8, delayed, Smooth-SwiGLU": (delayed, True),
    }
    num = sum(p.numel() for p in Model(te, sizes, setting.device, None).parameters())
    last = max(1, min(20, sizes.steps // 5))
    table = page.table(
        f"{num / 1e6:.0f} M parameters, {sizes.batch} × {sizes.context} bytes a step, "
        f"{len(data) / 1e6:.1f} MB of text",
        *("arm", "steps", "loss, first", "at a half", f"mean of the last {last}"),
        *("ms a step, unwatched", "findings"),
    )
    watching = [name for name in NEEDED_TO_WATCH if name in setting.missing]
    if watching:
        page.note(f"not watched, no findings: {', '.join(watching)} missing here")
    for place, (name, (recipe, smooth)) in enumerate(arms.items()):
        share = setting.left / (len(arms) - place)
        engine.fresh()
        try:
            arm = Arm(te, setting, sizes, recipe, smooth, not watching)
            table.add(name, *arm.train(data, share, last))
        except TimeoutError:
            raise
        except Exception as error:
            table.add(name, f"no result: {last_line(error)}")


def standard_library(device: str) -> Tensor:
    """uint8 [n]: the top-level modules of the running Python, joined in the order of names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


class Arm:
    """One training."""

    def __init__(
        self, te: Any, setting: Setting, sizes: Sizes, recipe: Any, smooth: bool, is_watched: bool
    ) -> None:
        self.te, self.setting, self.sizes, self.recipe = te, setting, sizes, recipe
        self.model = Model(te, sizes, setting.device, smooth_recipe() if smooth else None)
        self.is_watched, self.is_smooth = is_watched, smooth
        self.parameters = list(self.model.parameters())
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.parameters]
        how = {"betas": (0.9, 0.95), "weight_decay": 0.1, "fused": setting.device == "cuda"}
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, **how)

    def train(self, data: Tensor, seconds: float, last: int) -> Iterator[object]:
        """The cells of the row; it ends early rather than take longer than `seconds`."""
        end, losses, took = time.monotonic() + 0.9 * seconds, [], []
        with ExitStack() as stack:
            folder = self.setting.out / "runs" / f"{time.monotonic_ns()}"
            watch = self.watch(folder)
            if watch is not None:
                stack.enter_context(watch)
            for step in range(self.sizes.steps):
                begun = time.perf_counter()
                loss = self.step(step, data)
                if watch is not None:
                    watch.step(step, loss=loss)
                losses.append(loss.detach())
                took.append(time.perf_counter() - begun)
                if time.monotonic() > end:
                    break
        numbers = torch.stack(losses).float().tolist()
        unwatched = self.unwatched(data, len(losses))
        yield from (len(numbers), numbers[0], numbers[len(numbers) // 2])
        yield statistics.fmean(numbers[-last:])
        yield f"{1e3 * unwatched:.1f}"
        yield "not watched" if watch is None else found_in(folder)

    def watch(self, folder: Path) -> Any:
        """None where it cannot be watched: a product that a mitigation balances is not the one that
        gate and up explain, and fp8lab knows its own mitigations alone."""
        if not self.is_watched or self.is_smooth:
            return None
        import fp8lab

        return fp8lab.watch(self.model, folder, every=10)

    def unwatched(self, data: Tensor, first: int) -> float:
        """Median seconds of a step that nobody watches."""
        took = []
        for step in range(first, first + self.setting.pick(20, 2)):
            self.wait()
            begun = time.perf_counter()
            self.step(step, data)
            self.wait()
            took.append(time.perf_counter() - begun)
        return statistics.median(took)

    def wait(self) -> None:
        if self.setting.device == "cuda":
            torch.cuda.synchronize()

    def step(self, step: int, data: Tensor) -> Tensor:
        """Forward, backward, clipping and AdamW on the masters."""
        generator = torch.Generator().manual_seed(step)
        size = self.sizes
        starts = torch.randint(len(data) - size.context - 1, (size.batch, 1), generator=generator)
        window = starts + torch.arange(size.context + 1)
        text = data[window.to(data.device)].long()
        for parameter in self.parameters:
            parameter.grad = None
        region = contextlib.nullcontext()
        if self.recipe is not None:
            region = self.te.autocast(enabled=True, recipe=self.recipe)
        with region:
            logits = self.model(text[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else None
            master.grad = parameter.grad.float() if master.grad is None else master.grad
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, (step + 1) / 50)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return loss


def found_in(folder: Path) -> str:
    """What the diagnosis finds in a run, in a few words."""
    import fp8lab

    try:
        findings = fp8lab.diagnose(folder).findings
    except TimeoutError:
        raise
    except Exception as error:
        return f"no diagnosis: {last_line(error)}"
    words = [f"{f.severity} {f.cause} at {f.site}, since {f.since}" for f in findings]
    return "; ".join(words[:3]) + (f"; {len(words) - 3} more" if len(words) > 3 else "") or "none"


# --- the model -----------------------------------------------------------------------------------


class Model(nn.Module):
    """Bytes in, logits [batch, context, 256] out. With `smooth`, the recipe of the smoothed down
    projections, its feed-forwards balance the product's channels."""

    def __init__(self, te: Any, sizes: Sizes, device: str, smooth: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, sizes.width, dtype=torch.bfloat16, device=device)
        self.layers = nn.ModuleList(Layer(te, sizes, device) for _ in range(sizes.layers))
        self.norm = Norm(sizes.width, device)
        self.head = nn.Linear(sizes.width, 256, bias=False, dtype=torch.bfloat16, device=device)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() < 2:
                    continue
                ends = any(part in name for part in ("proj.", "fc2", "down"))
                std = 0.02 / math.sqrt(2 * sizes.layers) if ends else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if smooth is not None:
            for layer in self.layers:
                layer.mlp = Smooth(te, layer.mlp, device, smooth)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Norm(nn.Module):
    """RMSNorm in FP32."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.bfloat16, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-5).to(x.dtype)


class Layer(nn.Module):
    """Attention and feed-forward, each behind its norm."""

    def __init__(self, te: Any, sizes: Sizes, device: str) -> None:
        super().__init__()
        made = {"bias": False, "params_dtype": torch.bfloat16, "device": device}
        self.norm = Norm(sizes.width, device)
        self.qkv = te.Linear(sizes.width, 3 * sizes.width, **made)
        self.proj = te.Linear(sizes.width, sizes.width, **made)
        self.mlp: nn.Module = te.LayerNormMLP(
            sizes.width, sizes.hidden, activation="swiglu", normalization="RMSNorm", **made
        )
        self.heads = sizes.heads

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(turned(query), turned(key), value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, context, width))
        return x + self.mlp(x)  # type: ignore[no-any-return]


def turned(x: Tensor) -> Tensor:
    """Rotary positions, [..., context, head] -> the same."""
    context, size = x.shape[-2:]
    places = torch.arange(context, device=x.device).float()
    rates = 10000.0 ** (-torch.arange(0, size, 2, device=x.device).float() / size)
    angles = places[:, None] * rates
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    both = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return both.to(x.dtype)


def smooth_recipe() -> Any:
    """Of the smoothed down projections: scales just in time."""
    return engine.recipes().Float8CurrentScaling()


class Smooth(nn.Module):
    """The feed-forward of a te.LayerNormMLP as three te.Linear, its product balanced by channel:
    y = (W_down · diag(1 / s)) Q(s ⊙ product), s a power of two (2409.12517, section 4.4)."""

    def __init__(self, te: Any, fused: Any, device: str, recipe: Any) -> None:
        super().__init__()
        self.te, self.recipe = te, recipe
        hidden, width = fused.fc2_weight.shape[1], fused.fc2_weight.shape[0]
        made = {"bias": False, "params_dtype": torch.bfloat16, "device": device}
        self.norm = Norm(width, device)
        self.gate, self.up = (te.Linear(width, hidden, **made) for _ in range(2))
        self.down = divided(te)(hidden, width, **made)
        with torch.no_grad():
            for part, weight in zip(
                (self.gate, self.up, self.down),
                (*fused.fc1_weight.chunk(2), fused.fc2_weight),
                strict=True,
            ):
                part.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        product = F.silu(self.gate(normed).float()) * self.up(normed).float()
        amax = product.detach().abs().flatten(0, -2).amax(0).clamp(min=2.0**-100)
        scale = torch.exp2(-torch.ceil(torch.log2(amax)))
        self.down.divisor = scale.to(x.dtype)
        balanced = (product * scale).to(x.dtype)
        if not self.te.quantization.FP8GlobalStateManager.is_fp8_enabled():
            return self.down(balanced)  # type: ignore[no-any-return]
        with self.te.autocast(enabled=True, recipe=self.recipe):
            return self.down(balanced)  # type: ignore[no-any-return]


def divided(te: Any) -> Any:
    """te.Linear, whose columns are divided by `divisor` before they are cast."""

    class Divided(te.Linear):  # type: ignore[misc]
        divisor: Tensor | None = None

        def _get_weight_tensors(self) -> list[Tensor]:
            return [weight / self.divisor for weight in super()._get_weight_tensors()]

    return Divided
