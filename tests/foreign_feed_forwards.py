"""Feed-forwards as other libraries write them, imitated in plain torch.

Each class copies how its library computes, which of its children it calls and what it calls them;
what is left out (parallelism, kernels) makes no difference to who sees what. Names are theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HIDDEN = 16, 40


class Torchtitan(nn.Module):
    """torchtitan and OLMo-core `FeedForward`: w2 is down."""

    def __init__(self, dim: int = DIM, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TorchtitanDownUncalled(Torchtitan):
    """`AllGatherFusedFeedForward`: gate and up are called, down's weight is used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(self.w1(x)) * self.w3(x), self.w2.weight)


class TorchtitanFused(nn.Module):
    """`FusedSwiGLU`: gate and up alternate in one parameter [hidden, 2, dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.randn(HIDDEN, 2, DIM) / DIM**0.5)
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.w13.flatten(0, 1)).unflatten(-1, (HIDDEN, 2)).unbind(-1)
        return self.w2(F.silu(gate) * up)


class TorchtitanExperts(nn.Module):
    """`GroupedExperts`: three stacks, tokens sorted by expert."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.w1_EFD, self.w3_EFD = (
            nn.Parameter(torch.randn(experts, HIDDEN, DIM) / DIM**0.5) for _ in range(2)
        )
        self.w2_EDF = nn.Parameter(torch.randn(experts, DIM, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        offsets = torch.cumsum(num_tokens_per_expert, dim=0, dtype=torch.int32)
        gate = F.grouped_mm(x, self.w1_EFD.transpose(-2, -1), offs=offsets)
        hidden = F.silu(gate) * F.grouped_mm(x, self.w3_EFD.transpose(-2, -1), offs=offsets)
        return F.grouped_mm(hidden, self.w2_EDF.transpose(-2, -1), offs=offsets)


class Litgpt(nn.Module):
    """`LLaMAMLP`, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(DIM, HIDDEN)
        self.fc_2 = nn.Linear(DIM, HIDDEN)
        self.proj = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class BiasLater(nn.Linear):
    """Megatron's linear layers with `skip_bias_add`: the bias is returned, not added."""

    def forward(self, input: Tensor) -> Any:
        return F.linear(input, self.weight), self.bias


class Megatron(nn.Module):
    """`MLP` with a gated linear unit: fc1 is gate and up, its bias is added with the activation."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.linear_fc1 = BiasLater(DIM, 2 * HIDDEN, bias=bias)
        self.linear_fc2 = BiasLater(HIDDEN, DIM, bias=bias)

    def weighted(self, product: Tensor) -> Tensor:
        return product

    def forward(self, hidden_states: Tensor) -> Tensor:
        intermediate, bias = self.linear_fc1(hidden_states)
        gate, up = torch.chunk(intermediate if bias is None else intermediate + bias, 2, dim=-1)
        output, bias = self.linear_fc2(self.weighted(F.silu(gate) * up))
        return output if bias is None else output + bias


class MegatronExpert(Megatron):
    """`TEGroupedMLP`: the product is multiplied by the router's probability."""

    def weighted(self, product: Tensor) -> Tensor:
        probability = torch.linspace(0.1, 0.9, product.shape[-2])[:, None]
        return product * probability.to(product.dtype)


class _XformersFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1w2: Tensor, w3: Tensor) -> Tensor:
        w1, w2 = w1w2.unbind(0)
        gate, up = x @ w1.t(), x @ w2.t()
        product = F.silu(gate) * up
        ctx.save_for_backward(x, w1w2, w3, gate, up, product)
        return product @ w3.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w1w2, w3, gate, up, product = ctx.saved_tensors
        (grad,) = grads
        product_grad, slope = grad @ w3, torch.sigmoid(gate)
        gate_grad = product_grad * up * slope * (1 + gate * (1 - slope))
        up_grad = product_grad * F.silu(gate)
        rows = (grad.reshape(-1, grad.shape[-1]).t() @ product.reshape(-1, product.shape[-1]),)
        both = torch.stack([g.flatten(0, -2).t() @ x.flatten(0, -2) for g in (gate_grad, up_grad)])
        return gate_grad @ w1w2[0] + up_grad @ w1w2[1], both, rows[0]


class Xformers(nn.Module):
    """`SwiGLU` with packed weights: no child is called, and w3 is down."""

    def __init__(self) -> None:
        super().__init__()
        self.w12 = nn.Linear(DIM, 2 * HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.w12.weight.view(2, HIDDEN, DIM)
        output: Tensor = _XformersFunction.apply(x, packed, self.w3.weight)
        return output


class _LigerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (tensor.detach() for tensor in ctx.saved_tensors)
        slope = torch.sigmoid(gate)
        up_grad = grads[0] * gate * slope
        gate.copy_(grads[0] * up * slope * (1 + gate * (1 - slope)))
        up.copy_(up_grad)
        return gate, up


class Liger(nn.Module):
    """`LigerSwiGLUMLP`: its backward writes the gradients over gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.up_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_LigerFunction.apply(self.gate_proj(x), self.up_proj(x)))


class SeedTwice(Torchtitan):
    """Seed 000: gate is called twice in one forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w1(x).sigmoid() * self.w1(x) * self.w3(x))


class SeedWeights(nn.Module):
    """Seed 002: the children are never called, and w3 is down."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(F.linear(x, self.w1.weight)) * F.linear(x, self.w2.weight)
        return F.linear(hidden, self.w3.weight)


class Einsum(nn.Module):
    """Bare stacks multiplied by einsum; all tokens go to all experts."""

    def __init__(self, experts: int = 2) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(experts, HIDDEN, DIM)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, DIM) / HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.einsum("td,efd->etf", x, self.gate)
        up = torch.einsum("td,efd->etf", x, self.up)
        return torch.einsum("etf,efd->etd", F.gelu(gate) * up, self.down).sum(0)


class Clamped(Torchtitan):
    """DeepSeek-V4's: limits before the activation."""

    def __init__(self, limit: float = 7.0) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        up = self.w3(x).clamp(-self.limit, self.limit)
        return self.w2(F.silu(self.w1(x).clamp(max=self.limit)) * up)


class Nanochat(nn.Module):
    """`MLP`: ReLU², no gate."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(DIM, HIDDEN, bias=False)
        self.c_proj = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class PlainWeights(nn.Module):
    """GELU, no gate, no child called."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(HIDDEN, DIM) / DIM**0.5)
        self.bias = nn.Parameter(torch.randn(HIDDEN))
        self.down = nn.Parameter(torch.randn(DIM, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.up.T + self.bias) @ self.down.T
