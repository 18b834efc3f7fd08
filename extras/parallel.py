"""One model on several devices, by tensor parallelism: each process has a part of the heads and of every MLP's width.

    torchrun --nproc-per-node 4 run.py --model ERNIE-4.5-VL-28B-A3B-PT --image photo.jpg

torchrun sets RANK and WORLD_SIZE. Every process goes through the whole program, and only the first one speaks.
"""
import argparse
import atexit
import os
import sys
from typing import Callable, Iterator

import torch
from torch import Tensor, nn

from ernie_vl import ErnieVL, TextConfig, require
from load_weights import SkipInit
from run import RANK, WORLD_SIZE

DIVIDED = "num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"
SPLIT_DIM = {      # of the decoder's weights; names of the vision part are others
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "o_proj": 1, "down_proj": 1}


def join(device: str, args: argparse.Namespace) -> str:
    """Connects this process with the others, and returns its own device. All ranks draw the same tokens: they take the
    first one's seed. What ranks above 0 print is dropped. Raises InputError."""
    require(device != "mps", "several processes share a model on CUDA devices, or on a CPU: use --device cpu")
    require(not args.compile, "a model that is shared among processes is not compiled: leave out --compile")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    atexit.register(torch.distributed.destroy_process_group)
    args.seed = broadcast(int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed)
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    return device


def broadcast(value):
    """The first rank's value, on all of them."""
    if WORLD_SIZE == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def stage(rank: int, ranks: int) -> Callable:
    """A stage of load_weights.load that makes the model of one process of several: the shapes of its shard, its rows or
    columns of every tensor, and the all-reduces. Shards come before quantising. Raises InputError for a quantised
    model, and where heads or widths cannot be divided by the number of processes."""
    def shard(model: ErnieVL, tensors: Iterator) -> tuple[ErnieVL, Iterator]:
        require(all(parameter.is_floating_point() for parameter in model.parameters()),
                "quantised weights cannot be sharded: load the original checkpoint, with --quantize")
        with torch.device("meta"), SkipInit():
            model = ErnieVL(model.cfg._replace(text=local_config(model.cfg.text, ranks)))
        all_reduce_outputs(model)
        return model, ((name, local_shard(name, tensor, rank, ranks)) for name, tensor in tensors)
    return shard


def local_config(text: TextConfig, ranks: int) -> TextConfig:
    """The config of one process: embedding, head and the vision part are whole everywhere."""
    return text._replace(**{name: divide(name, getattr(text, name), ranks) for name in DIVIDED})


def divide(name: str, value: int | tuple[int, ...], ranks: int) -> int | tuple[int, ...]:
    if isinstance(value, tuple):
        return tuple(divide(name, width, ranks) for width in value)
    require(value % ranks == 0, f"{ranks} processes cannot share {name} {value}: take a number that divides it")
    return value // ranks


def local_shard(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """This rank's rows or columns. Rows are a view of the file, of which the other ranks' pages are never read."""
    dim = SPLIT_DIM.get(name.split(".")[-2])
    return tensor if dim is None else tensor.chunk(ranks, dim)[rank].contiguous()


def all_reduce_outputs(model: ErnieVL) -> None:
    """Every rank has computed a part of each sum over heads and widths: two all-reduces a layer complete them."""
    def all_reduce(module: nn.Module, args: tuple, part: Tensor) -> Tensor:
        torch.distributed.all_reduce(part)
        return part
    for layer in model.layers:
        layer.self_attn.register_forward_hook(all_reduce)
        layer.mlp.register_forward_hook(all_reduce)
