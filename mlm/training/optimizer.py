"""The optimizer: AdamW; or Muon for the matrices inside the model, and AdamW for the rest."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MOMENTUM = 0.95
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # coefficients of a polynomial of fifth degree, steep at 0
ITERATIONS = 5
MATCH_ADAMW = 0.2  # root mean square of AdamW's usual update, in units of the learning rate


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW, but for the groups that say "muon": these take a momentum's nearest orthogonal matrix for their update.

    Muon: Jordan et al., kellerjordan.github.io/posts/muon. Its updates are scaled to be as large as AdamW's, so that
    learning rate and weight decay mean the same: Liu et al., Muon is Scalable for LLM Training (arXiv 2502.16982).
    As torch.optim.Muon, but all matrices of a shape go through the iteration together, and in a precision of choice:
    its bfloat16 makes steps of rounding, so that layouts of micro-batches would drift apart in float32.
    """

    def __init__(self, groups: list[dict[str, Any]], precision: torch.dtype, **options: Any):
        super().__init__(groups, **options)
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes a step; a parameter without a gradient stays. The gradients of Muon's matrices are used up."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_of_muon(group)
        return super().step(closure)

    def _step_of_muon(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"]
            momentum.lerp_(parameter.grad, 1 - MOMENTUM)
            by_shape[parameter.shape].append((parameter, parameter.grad.lerp(momentum, MOMENTUM)))
            parameter.grad = None
        for shape, updated in by_shape.items():
            updates = orthogonalize(torch.stack([update for _, update in updated]), self.precision)
            rate = group["lr"] * MATCH_ADAMW * max(shape) ** 0.5
            for (parameter, _), update in zip(updated, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * rate)


def orthogonalize(matrices: Tensor, precision: torch.dtype) -> Tensor:
    """Returns for matrices (n, rows, columns) the nearest ones with orthonormal rows or columns, roughly: most singular
    values become 0.7 to 1.2, by Newton and Schulz's iteration in that precision."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    states = matrices.mT if is_tall else matrices
    states = (states / states.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(precision)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = states @ states.mT
        states = torch.baddbmm(states, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), states, beta=a)
    return (states.mT if is_tall else states).to(matrices.dtype)


def _tables(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters that have a row for each token, position or the like: of all embeddings, and of
    the projection to the vocabulary."""
    found = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and (output := module.get_output_embeddings()) is not None:
            found.add(id(output.weight))
    return found


def make_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, mixed_precision: str = "no"
) -> torch.optim.Optimizer:
    """Returns the optimizer of that name, "adamw" or "muon".

    mixed_precision: of the forward passes, as accelerate names it; Muon iterates in bfloat16 where it is bf16, else in
    float32. Muon has the matrices of the layers and of the head. Embeddings, of which the projection to the vocabulary
    is most often one, are AdamW's. Weight decay is on all matrices and embeddings, not on biases and LayerNorm.
    """
    of_muon: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    tables = _tables(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_inner = parameter.ndim == 2 and id(parameter) not in tables
            group = vectors if parameter.ndim < 2 else of_muon if name == "muon" and is_inner else matrices
            group.append(parameter)
    groups = [
        {"params": of_muon, "weight_decay": weight_decay, "muon": True},
        {"params": matrices, "weight_decay": weight_decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
    ]
    # BERT's own epsilon: with 1e-8 Adam would blow the rounding noise of the smallest gradients up into steps.
    precision = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    return MuonWithAdamW(groups, precision, lr=learning_rate, eps=1e-6, fused=True)
