"""What suits a CPU. run.py applies it to every model that it has loaded on one, where this file is there.

Measured with torch 2.13; nothing of it changes what is computed, beyond rounding.
"""
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_MODEL = 1e7      # parameters: below it, threads wait longer for one another than they compute
FEW_ROWS = 4           # from so many rows on the conversion of bf16 weights to fp32 pays


class BF16LinearInFP32(nn.Module):
    """A bf16 layer on a CPU without bf16 instructions: from 4 rows on its products are faster in fp32, conversion of
    the weights included (7 times at 64 rows, measured with AVX2), and no less exact. Has the parameters of `linear`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:                                                 # (T, in) -> (T, out)
        if len(x) < FEW_ROWS:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x.float(), *(parameter.float() for parameter in self.parameters())).type_as(x)


def has_bf16_products() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def tune_for_cpu(model: nn.Module, compiled: bool = False) -> nn.Module:
    """Tunes a model that is on the CPU, in place; compiled: it will be compiled afterwards. A small model sets torch to
    one thread: on two cores tiny/ took 25 to 85 ms a token with two, and 1.8 ms with one."""
    for layer in () if compiled else model.modules():
        if hasattr(layer, "pack"):      # quantised layers have a layout for the CPU's kernels
            layer.pack()
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        decode_without_onednn(model)
    if not has_bf16_products():
        compute_bf16_in_fp32(model)
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    return model


def compute_bf16_in_fp32(model: nn.Module) -> None:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in (name for name, linear in linears.items() if linear.weight.dtype == torch.bfloat16):
        model.set_submodule(name, BF16LinearInFP32(linears[name]))


def decode_without_onednn(model: nn.Module) -> None:
    """With AVX-512, oneDNN reads the bf16 weights of a product of one row at half the speed of torch's own kernels (11
    GB/s a core instead of 22), which are several times slower from a few rows on: off while one token goes through."""
    switch, onednn = ExitStack(), torch.backends.mkldnn

    def off(module: nn.Module, args: tuple, kwargs: dict) -> None:
        switch.close()      # an interrupt, unlike an error, skips the hook behind the pass
        inputs = args[0] if args else kwargs["inputs"]
        enabled = onednn.enabled and len(inputs.ids) > 1
        switch.enter_context(onednn.flags(enabled=enabled, allow_tf32=None))      # None: as it is

    model.register_forward_pre_hook(off, with_kwargs=True)
    model.register_forward_hook(lambda module, args, logits: switch.close(), always_call=True)
