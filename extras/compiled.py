"""The decode step as one compiled function: run.py --compile, made for a GPU.

Experts run in grouped products, the window of keys and values seldom changes its size, and nothing within the step
waits for the device. Prompts, and whatever else is not one generated token, go through the plain model.
"""
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie_vl import Attention, ErnieVL, Experts, Inputs, KVCache, require, rotary, rotate_pairs
from extras.quantize import QuantizedLinear, matvec

SMALLEST_WINDOW = 256      # tokens
PROJECTIONS = "gate_proj", "up_proj", "down_proj"


class GroupedExperts(nn.Module):
    """Experts whose weights (and scales) are views of three stacks (E, out, in). All that were chosen run in three
    products, whoever they are: no device-to-host synchronisation."""

    def __init__(self, plain: Experts):
        super().__init__()
        self.gate, self.experts = plain.gate, plain.experts
        self.stacks = {name: stack([getattr(expert, name) for expert in self.experts]) for name in PROJECTIONS}

    def weights(self, name: str, experts: Tensor | slice = slice(None)) -> Tensor:          # -> (experts, out, in)
        linear, parts = getattr(self.experts[0], name), [part[experts] for part in self.stacks[name]]
        return linear.dequantized(*parts) if isinstance(linear, QuantizedLinear) else parts[0]

    def forward(self, x: Tensor) -> Tensor:                                                 # (T, D) -> (T, D)
        weights, chosen = self.gate(x)                                                      # (T, K), (T, K)
        if len(x) == 1:
            return weights @ swiglu(x, lambda rows, name: matvec(self.weights(name, chosen[0]), rows))
        order = chosen.flatten().argsort(stable=True)                                       # (T*K,)  by expert
        experts = torch.arange(len(self.experts), device=x.device)
        ends = (chosen.flatten() == experts[:, None]).sum(1).cumsum(0).int()                # (E,)  the rows of each
        rows = x[order // chosen.shape[1]]                                                  # (T*K, D)
        rows = swiglu(rows, lambda rows, name: grouped_product(rows, self.weights(name), ends))
        return (rows[order.argsort()].view(*chosen.shape, -1) * weights[..., None]).sum(1)


def stack(linears: list[nn.Module]) -> list[Tensor]:
    """One tensor for each of their parameters, weight and scale, of which the layers' own become views."""
    stacks = []
    for name, _ in list(linears[0].named_parameters()):
        stacks.append(torch.stack([getattr(linear, name).detach() for linear in linears]))
        for linear, view in zip(linears, stacks[-1]):
            setattr(linear, name, nn.Parameter(view, requires_grad=False))
    return stacks


def swiglu(x: Tensor, product: Callable) -> Tensor:
    return product(F.silu(product(x, "gate_proj")) * product(x, "up_proj"), "down_proj")


def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:                 # (rows, in) -> (rows, out)
    return F.grouped_mm(rows.type_as(weights), weights.mT, offs=ends).type_as(rows)


class CompiledErnieVL(nn.Module):
    """An ErnieVL whose generated tokens go through a compiled function. Its shapes stay the same while the context
    grows: keys and values stand in a window that is longer than they are, and masked behind them. Falls back to eager
    execution, with a message, if compilation fails."""

    def __init__(self, model: ErnieVL, log: Callable[[str], None]):
        super().__init__()
        mode = "reduce-overhead" if model.norm.weight.is_cuda else None      # a CUDA graph: one launch for all of it
        self.model, self.cfg, self.prepare, self.log = model, model.cfg, model.prepare, log
        self.step = torch.compile(step, mode=mode, fullgraph=True)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def forward(self, inputs: Inputs, cache: list[KVCache] | None = None, only_last: bool = False) -> Tensor:
        """As ErnieVL.forward."""
        if cache is None or not cache[0].length or len(inputs.ids) > 1 or inputs.is_vision.any():
            return self.model(inputs, cache, only_last)
        place = cache[0].length
        open_windows(cache, place)
        cos, sin = rotary(inputs.positions, self.cfg.text, self.model.embed_tokens.weight)
        logits = self.run_step(self.model, inputs.ids, cos, sin, inputs.ids.new_tensor([place]),
                               [kv.buffer for kv in cache])
        for kv in cache:
            kv.length = place + 1
        return logits

    def run_step(self, *args) -> Tensor:
        try:
            return self.step(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            self.log(f"nothing can be compiled here ({str(error).strip().splitlines()[0]}): going on without")
            self.step = step
            return step(*args)


def open_windows(cache: list[KVCache], place: int) -> None:
    """Makes room for one token behind `place` others. Windows grow in steps of 256 places, or of an eighth to a quarter
    of what they hold: seldom a new window, never a long empty one."""
    more = max(SMALLEST_WINDOW, 1 << place.bit_length() >> 3)
    window = (place // more + 1) * more
    for kv in cache:
        # A buffer of KVCache's own may happen to be as long, but behind its tokens stands anything, even NaN.
        if kv.buffer.shape[2] != window or not hasattr(kv.buffer, "is_window"):
            grown = kv.buffer.new_zeros(*kv.buffer.shape[:2], window, kv.buffer.shape[3])
            grown[:, :, :place] = kv.buffer[:, :, :place]
            kv.buffer, grown.is_window = grown, True
            torch._dynamo.mark_static_address(grown)                    # so a CUDA graph may keep it where it is
            torch._dynamo.maybe_mark_dynamic(grown, 2)                  # so a larger window is not compiled anew


def compile_model(model: ErnieVL, log: Callable[[str], None] = print) -> CompiledErnieVL:
    """Stacks the experts of a loaded model, which keeps all of them in memory, and compiles its step by making one."""
    require(model.norm.weight.dtype != torch.float64, "grouped products have no fp64: leave --compile or --dtype out")
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(name, GroupedExperts(module))
    compiled = CompiledErnieVL(model, log).eval()
    log("compiling, which takes up to a few minutes")
    cache = [KVCache() for _ in model.layers]
    with torch.inference_mode():
        for _ in range(2):      # the first pass is eager, the second is a step, as generate makes them
            compiled(model.prepare([0]), cache, only_last=True)
    return compiled


def step(model: ErnieVL, ids: Tensor, cos: Tensor, sin: Tensor, place: Tensor, buffers: list[Tensor]) -> Tensor:
    """What ErnieVL.forward does with one text token behind `place` others, in sizes that do not depend on it: (1, V)"""
    x = model.embed_tokens(ids)                                                             # (1, D)
    mask = torch.arange(buffers[0].shape[2], device=ids.device)[None] <= place              # (1, window)
    for layer, buffer in zip(model.layers, buffers):
        x = x + attend_window(layer.self_attn, layer.input_layernorm(x), cos, sin, place, buffer, mask)
        y, mlp = layer.post_attention_layernorm(x), layer.mlp
        if layer.sparse:
            x = x + mlp.text_moe(y) + (mlp.shared_experts(y) if mlp.shared_experts else 0)
        else:
            x = x + mlp(y)
    return model.lm_head(model.norm(x))


def attend_window(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, place: Tensor, buffer: Tensor,
                  mask: Tensor) -> Tensor:
    """Attention of one token, whose key and value are written to their place in the window (2, G, window, d)."""
    d = attention.head_dim
    q, k, v = (p(x).unflatten(-1, (-1, d)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    buffer.index_copy_(2, place, torch.stack((rotate_pairs(k, cos, sin), v)).transpose(1, 2))
    q = rotate_pairs(q, cos, sin).view(1, buffer.shape[1], -1, d)                           # (1, G, H/G, d)
    return attention.o_proj(F.scaled_dot_product_attention(q, *buffer[:, None], attn_mask=mask).reshape(1, -1))
