"""Mistakes that a port of this model has made, or could make, as edits of ernie_vl.py. The tests plant each of them,
and the numbers in reference.safetensors must notice it; compare.py plants them to find the one that a port has made."""
import re
import sys
import types
from typing import NamedTuple

import torch

from ernie_vl import ErnieVL
from load_weights import SkipInit

FILE = "<ernie_vl>"                          # the name under which an edited copy is compiled
TOKEN = re.compile(r"\w+|[^\w\s]")


class Mistake(NamedTuple):
    place: str                               # where to look in ernie_vl.py; what patches hold comes from tokenizer.py
    edits: tuple[tuple[str, str], ...]       # what stands there, and what would stand there


def at(place: str, *edits: str) -> Mistake:
    return Mistake(place, tuple(zip(edits[::2], edits[1::2], strict=True)))


def head(logits: str) -> tuple[str, ...]:
    return ("self.lm_head = nn.Linear(", "self.lm_head = Head(", "class ErnieVL(",
            f"class Head(nn.Linear):\n    def forward(self, x):\n        return {logits}\n\n\nclass ErnieVL(")


# Words that several mistakes begin from. `PIXELS` are the colours as numbers from 0 to 1, (N, 3, 196).
PATCHES, LN = "patches.type_as(self.patch_embed.weight)", "LAYER_NORM_EPS)"
STD, MEAN = "(0.26862954, 0.26130258, 0.27577711)", "(0.48145466, 0.4578275, 0.40821073)"
COLUMN = "patches.new_tensor({})[:, None].type_as(self.patch_embed.weight)"
PIXELS = f"({PATCHES}.view(-1, 3, 196) * {COLUMN.format(STD)} + {COLUMN.format(MEAN)})"
QKV, SDPA = "self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)", "F.scaled_dot_product_attention(*qkv)"
FRAMES, PAIRS = "[h * w for t, h, w in grids for _ in range(t)]", "(frames[0::2], frames[1::2])"
PLACES, AFTER = "torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T", "max(t, h, w) - len(run)"
AXES, RATES = "[1, 2] * pairs_h + [0] * pairs_t", "inv_freq(len(axis), cfg.rope_theta, like)"
VISION_RATES = "inv_freq(self.head_dim // 4, VISION_ROPE_THETA, self.patch_embed.weight)"
TURNED, BIASED = "angles.cos(), angles.sin()", "p + self.e_score_correction_bias"
ATTEND, CAUSAL = "x + self.self_attn(self.input_layernorm(x), cos, sin, cache)", "k, v, mask, is_causal=T == S)"
SWIGLU, SHARED = "F.silu(self.gate_proj(x)) * self.up_proj(x)", "y + self.shared_experts(x)"
EXPERT = "weights[token_idx, slot, None] * self.experts[e](x[token_idx])"
WEIGHTS = "(weights / weights.sum(-1, keepdim=True).clamp(min=1e-12))"
LOGITS = "F.linear(widen(x), widen(self.weight))"
BOTH, ADD_MLP = "for experts, mask in", "return x + (self.mlp(y, is_vision) if self.sparse else self.mlp(y))"
PLAIN = ("self.after_norm = RMSNorm(decoder_width, eps)",      # after_norm is the resampler's: it stays as it is
         "self.after_norm = RMSNorm(decoder_width, eps)\n        self.after_norm.plain = True")
NORM1, NORM2 = (f"self.norm{n} = nn.LayerNorm(cfg.hidden_size, {LN}" for n in (1, 2))

MISTAKES = {  # "an implementation in which ..."
    # ---- patches
    "pixels are not normalised with mean and deviation": at("patchify", PATCHES, f"{PIXELS}.flatten(1)"),
    "pixels are normalised with mean and deviation 0.5": at("patchify", PATCHES, f"(2 * {PIXELS} - 1).flatten(1)"),
    "pixels are normalised with the numbers of ImageNet": at(
        "patchify", PATCHES, f"(({PIXELS} - {COLUMN.format('(0.485, 0.456, 0.406)')})"
                          f" / {COLUMN.format('(0.229, 0.224, 0.225)')}).flatten(1)"),
    "pixels are normalised without a division by 255": at(
        "patchify", PATCHES, f"((255 * {PIXELS} - {COLUMN.format(MEAN)}) / {COLUMN.format(STD)}).flatten(1)"),
    "mean and deviation are swapped": at(
        "patchify", PATCHES, f"(({PIXELS} - {COLUMN.format(STD)}) / {COLUMN.format(MEAN)}).flatten(1)"),
    "red and blue are swapped before they are normalised": at(
        "VisionTransformer", PATCHES,
        f"(({PIXELS}.flip(1) - {COLUMN.format(MEAN)}) / {COLUMN.format(STD)}).flatten(1)"),
    "red and blue are swapped": at("VisionTransformer", PATCHES, f"{PATCHES}.view(-1, 3, 196).flip(1).flatten(1)"),
    "colours are the last axis of a patch": at(
        "VisionTransformer", PATCHES, f"{PATCHES}.view(-1, 3, 196).transpose(1, 2).flatten(1)"),
    "rows and columns inside a patch are swapped": at(
        "VisionTransformer", PATCHES, f"{PATCHES}.view(-1, 3, 14, 14).transpose(2, 3).flatten(1)"),
    # ---- vision transformer
    "patches come in raster order": at(
        "patchify", PATCHES, "torch.cat([one.view(t, h // 2, w // 2, 2, 2, -1).transpose(2, 3).flatten(0, 4)\n"
        "            for one, (t, h, w) in zip(patches.split([t * h * w for t, h, w in grids]), grids)])"
        ".type_as(self.patch_embed.weight)"),
    "row and column are swapped in the ViT's rotary embedding": at(
        "patch_coordinates", "return blocks.transpose(1, 2)", "return blocks.flip(-1).transpose(1, 2)"),
    "the ViT's positions are in raster order": at(
        "patch_coordinates", "return blocks.transpose(1, 2).reshape(h * w, 2)", "return raster"),
    "the ViT's positions count along the patches, in one dimension": at(
        "patch_coordinates", "return blocks.transpose(1, 2).reshape(h * w, 2)",
        "return torch.arange(h * w)[:, None].expand(-1, 2)"),
    "the ViT has no rotary embedding": at("VisionTransformer", TURNED + "\n        frame_sizes",
                                          "torch.ones_like(angles), 0 * angles\n        frame_sizes"),
    "the ViT's frequencies are spread over d instead of d/2": at(
        "VisionTransformer", "VISION_ROPE_THETA = 10_000.0", "VISION_ROPE_THETA = 100.0"),
    "the ViT's rotary theta is that of the decoder, 500,000": at(
        "VisionTransformer", "VISION_ROPE_THETA = 10_000.0", "VISION_ROPE_THETA = 500_000.0"),
    "the ViT's rows and columns take the even and the odd frequencies of one series": at(
        "VisionTransformer", VISION_RATES,
        "inv_freq(self.head_dim // 2, VISION_ROPE_THETA, self.patch_embed.weight).view(-1, 2).T"),
    "the ViT's rotary embedding rotates adjacent channels": at(
        "rotate_halves", "class VisionMLP", "rotate_halves = lambda *x: rotate_pairs(*x)\n\n\nclass VisionMLP"),
    "the ViT's rotary embedding rotates the other way": at(
        "rotate_halves", "torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)",
        "torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)"),
    "the frames of a video attend to each other": at("VisionAttention", FRAMES, "[t * h * w for t, h, w in grids]"),
    "all images and videos attend to each other in the ViT": at("VisionAttention", FRAMES, "[len(patches)]"),
    "the ViT's attention is causal": at("VisionAttention", SDPA, SDPA[:-1] + ", is_causal=True)"),
    "the ViT's attention scores are not divided by √d": at("VisionAttention", SDPA, SDPA[:-1] + ", scale=1.0)"),
    "the ViT's attention scores are divided by √C instead of √d": at(
        "VisionAttention", SDPA, SDPA[:-1] + ", scale=x.shape[1]**-0.5)"),
    "qkv is read head by head, q, k and v of each": at(
        "VisionAttention", QKV, "self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).unbind(2)"),
    "the ViT's qkv is read in the order k, q, v": at(
        "VisionAttention", "q, k, v = self.qkv(x)", "k, q, v = self.qkv(x)"),
    "the ViT's qkv is read in the order v, k, q": at(
        "VisionAttention", "q, k, v = self.qkv(x)", "v, k, q = self.qkv(x)"),
    "the ViT's heads are the fast axis of q, k and v": at(
        "VisionAttention", QKV, "self.qkv(x).unflatten(-1, (3, -1, self.num_heads)).transpose(2, 3).unbind(1)"),
    "the ViT's heads are joined channel by channel": at(
        "VisionAttention", "self.proj(y.transpose(0, 1).flatten(1))", "self.proj(y.permute(1, 2, 0).flatten(1))"),
    "the bias of the ViT's qkv is missing": at("VisionAttention", "self.qkv(x)", "(self.qkv(x) - self.qkv.bias)"),
    "the bias of the ViT's attention output is missing": at(
        "VisionAttention", "return self.proj(y.transpose(0, 1).flatten(1))",
        "return self.proj(y.transpose(0, 1).flatten(1)) - self.proj.bias"),
    "the biases of the ViT's MLP are missing": at(
        "VisionMLP", "a = self.fc1(x)", "a = self.fc1(x) - self.fc1.bias",
        "self.fc2(a * torch.sigmoid(1.702 * a))", "self.fc2(a * torch.sigmoid(1.702 * a)) - self.fc2.bias"),
    "the ViT has the exact GELU instead of QuickGELU": at("VisionMLP", "a * torch.sigmoid(1.702 * a)", "F.gelu(a)"),
    "the ViT has the tanh GELU instead of QuickGELU": at(
        "VisionMLP", "a * torch.sigmoid(1.702 * a)", 'F.gelu(a, approximate="tanh")'),
    "the ViT has SiLU instead of QuickGELU": at("VisionMLP", "a * torch.sigmoid(1.702 * a)", "F.silu(a)"),
    "the ViT has ReLU instead of QuickGELU": at("VisionMLP", "a * torch.sigmoid(1.702 * a)", "F.relu(a)"),
    "the ViT's blocks take the norms after the residual sums": at(
        "VisionBlock", "x = x + self.attn(self.norm1(x), cos, sin, frame_sizes)",
        "x = self.norm1(x + self.attn(x, cos, sin, frame_sizes))",
        "return x + self.mlp(self.norm2(x))", "return self.norm2(x + self.mlp(x))"),
    "the first norm of the ViT's blocks is missing": at("VisionBlock", "self.attn(self.norm1(x)", "self.attn((x)"),
    "the second norm of the ViT's blocks is missing": at("VisionBlock", "self.mlp(self.norm2(x))", "self.mlp(x)"),
    "attention and MLP of the ViT's blocks run side by side": at(
        "VisionBlock", "return x + self.mlp(self.norm2(x))", "return x + self.mlp(self.norm2(before))",
        "x = x + self.attn(self.norm1(x)", "before = x\n        x = x + self.attn(self.norm1(x)"),
    "the residual of the ViT's attention is missing": at("VisionBlock", "x = x + self.attn(", "x = self.attn("),
    "the ViT's norms are RMSNorms with a bias": at(
        "VisionBlock", NORM1, "self.norm1 = RMSLayerNorm(cfg.hidden_size, LAYER_NORM_EPS)",
        NORM2, "self.norm2 = RMSLayerNorm(cfg.hidden_size, LAYER_NORM_EPS)",
        f"self.ln = nn.LayerNorm(cfg.hidden_size, {LN}",
        "self.ln = RMSLayerNorm(cfg.hidden_size, LAYER_NORM_EPS)", "class VisionAttention",
        "class RMSLayerNorm(nn.LayerNorm):\n    def forward(self, x):\n"
        "        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) + self.bias\n\n\nclass VisionAttention"),
    "the last norm of the ViT is missing": at("VisionTransformer", "return self.ln(x)", "return x"),
    "the last block of the ViT is left out": at("VisionTransformer", "for block in self.blocks:",
                                                "for block in self.blocks[:-1]:"),
    "all LayerNorms have the epsilon 1e-5": at("LAYER_NORM_EPS", "LAYER_NORM_EPS = 1e-6", "LAYER_NORM_EPS = 1e-5"),
    "the LayerNorms of the ViT's blocks have the epsilon 1e-5": at(
        "VisionBlock", NORM1, NORM1.replace(LN, "1e-5)"), NORM2, NORM2.replace(LN, "1e-5)")),
    "the LayerNorms of the resampler have the epsilon 1e-5": at(
        "merge_mlp", f"nn.LayerNorm(n_out, {LN}", "nn.LayerNorm(n_out, 1e-5)"),
    # ---- resampler
    "the resampler has the tanh GELU": at("merge_mlp", "nn.GELU()", 'nn.GELU("tanh")'),
    "the resampler has SiLU instead of GELU": at("merge_mlp", "nn.GELU()", "nn.SiLU()"),
    "the resampler has QuickGELU instead of GELU": at(
        "merge_mlp", "nn.GELU()", "QuickGELU()", "def merge_mlp",
        "class QuickGELU(nn.Module):\n    def forward(self, x):\n"
        "        return x * torch.sigmoid(1.702 * x)\n\n\ndef merge_mlp"),
    "the resampler has no GELU": at("merge_mlp", "nn.GELU()", "nn.Identity()"),
    "the LayerNorms of the resampler are missing": at(
        "merge_mlp", "nn.Sequential(nn.Linear(n_in, n_out)", "WithoutNorm(nn.Linear(n_in, n_out)", "def merge_mlp",
        "class WithoutNorm(nn.Sequential):\n    def forward(self, x):\n        return self[2](self[1](self[0](x)))\n\n"
        "\ndef merge_mlp"),
    "the resampler joins four neighbours of a row instead of 2 x 2 patches": at(
        "Resampler", "x = self.spatial_linear(x.reshape(-1, self.merged_width))",
        "x = torch.cat([one.view(t, h // 2, w // 2, 2, 2, -1).transpose(2, 3).flatten(0, 4) for one, (t, h, w) in\n"
        "            zip(x.split([t * h * w for t, h, w in grids]), grids)])\n"
        "        x = self.spatial_linear(x.reshape(-1, self.merged_width))"),
    "the resampler joins 2 x 2 patches column by column": at(
        "Resampler", "x.reshape(-1, self.merged_width)",
        "x.view(-1, 2, 2, x.shape[1]).transpose(1, 2).reshape(-1, self.merged_width)"),
    "the resampler joins 2 x 2 patches channel by channel": at(
        "Resampler", "x.reshape(-1, self.merged_width)",
        "x.view(-1, 4, x.shape[1]).transpose(1, 2).reshape(-1, self.merged_width)"),
    "an image is paired with zeros instead of itself": at(
        "Resampler", "(frames, frames) if", "(frames, 0 * frames) if"),
    "odd and even frames are swapped": at("Resampler", PAIRS, "(frames[1::2], frames[0::2])"),
    "the first half of the frames is paired with the second": at("Resampler", PAIRS, "frames.chunk(2)"),
    "a frame is paired with itself": at("Resampler", PAIRS, "(frames[0::2], frames[0::2])"),
    "two frames are joined channel by channel": at(
        "Resampler", "torch.cat((even, odd), dim=-1).flatten(0, 1)",
        "torch.stack((even, odd), dim=-1).flatten(2).flatten(0, 1)"),
    "the tokens of a video run over the frames first": at(
        "Resampler", "torch.cat((even, odd), dim=-1).flatten(0, 1)",
        "torch.cat((even, odd), dim=-1).transpose(0, 1).flatten(0, 1)"),
    "after_norm is missing": at("Resampler", "return self.after_norm(", "return ("),
    "after_norm is a LayerNorm": at("Resampler", "return self.after_norm(", "return centred(self.after_norm, ",
                                    "class RMSNorm(", "def centred(norm, x):\n    return F.layer_norm("
                                    "x, x.shape[-1:], norm.weight, None, norm.eps)\n\n\nclass RMSNorm("),
    "after_norm has the epsilon of the LayerNorms, 1e-6": at(
        "Resampler", "self.after_norm = RMSNorm(decoder_width, eps)",
        "self.after_norm = RMSNorm(decoder_width, LAYER_NORM_EPS)"),
    "the features of images stand before those of videos": at(
        "ErnieVL.embed", "y = self.resampler_model(y, inputs.grids)",
        "y = self.resampler_model(y, inputs.grids)\n"
        "            parts = y.split([t * h * w for t, h, w in map(token_grid, inputs.grids)])\n"
        "            y = torch.cat([part for part, _ in"
        " sorted(zip(parts, inputs.grids), key=lambda one: one[1][0] > 1)])"),
    "image features stand one placeholder too late": at("ErnieVL.embed", "= y.type_as(x)", "= y.type_as(x).roll(1, 0)"),
    # ---- positions and rotary embedding of the decoder
    "every token has one position, as if there were text alone": at(
        "token_positions", "return positions", "return torch.arange(len(ids)).expand(3, -1)"),
    "positions are listed as time, column, row": at(
        "token_positions", "return positions", "return positions[[0, 2, 1]]"),
    "image tokens are numbered column by column": at(
        "token_positions", PLACES,
        "torch.cartesian_prod(torch.arange(t), torch.arange(w), torch.arange(h)).T[[0, 2, 1]]"),
    "image tokens are numbered along the line": at("token_positions", PLACES, "torch.arange(t * h * w).expand(3, -1)"),
    "image tokens are numbered from 0": at("token_positions", "positions[:, first : first + 1] + inside", "inside"),
    "rows and columns of image tokens are counted in patches": at(
        "token_positions", PLACES, "torch.cartesian_prod(torch.arange(t), 2 * torch.arange(h), 2 * torch.arange(w)).T"),
    "time counts frames instead of pairs of frames": at(
        "token_positions", PLACES, "torch.cartesian_prod(2 * torch.arange(t), torch.arange(h), torch.arange(w)).T"),
    "time counts frames instead of pairs of frames, and text continues behind the largest": at(
        "token_positions", PLACES, "torch.cartesian_prod(2 * torch.arange(t), torch.arange(h), torch.arange(w)).T",
        AFTER, "max(2 * t - 1, h, w) - len(run)"),
    "rows and columns are counted in patches, and text continues behind the largest": at(
        "token_positions", PLACES, "torch.cartesian_prod(torch.arange(t), 2 * torch.arange(h), 2 * torch.arange(w)).T",
        AFTER, "max(t, 2 * h, 2 * w) - len(run)"),
    "rows and columns of image tokens are numbered from 0": at(
        "token_positions", "positions[:, first : first + 1] + inside",
        "positions[:, first : first + 1] * torch.tensor([[1], [0], [0]]) + inside"),
    "the frames of a video have the same time": at(
        "token_positions", PLACES, "torch.cartesian_prod(0 * torch.arange(t), torch.arange(h), torch.arange(w)).T"),
    "an image counts as one position": at("token_positions", AFTER, "1 - len(run)"),
    "text continues after the number of image tokens": at("token_positions", AFTER, "t * h * w - len(run)"),
    "text continues after the number of rows": at("token_positions", AFTER, "h - len(run)"),
    "text continues after the number of columns": at("token_positions", AFTER, "w - len(run)"),
    "text after a video continues without regard to time": at("token_positions", AFTER, "max(h, w) - len(run)"),
    "text continues one position too early": at("token_positions", AFTER, "max(t, h, w) - len(run) - 1"),
    "text continues one position too late": at("token_positions", AFTER, "max(t, h, w) - len(run) + 1"),
    "h and w are swapped in the decoder's rotary embedding": at("rotary", AXES, "[2, 1] * pairs_h + [0] * pairs_t"),
    "the rotary sections stand side by side, h, w, t": at(
        "rotary", AXES, "[1] * pairs_h + [2] * pairs_h + [0] * pairs_t"),
    "the rotary sections stand side by side, t, h, w": at(
        "rotary", AXES, "[0] * pairs_t + [1] * pairs_h + [2] * pairs_h"),
    "the rotary sections stand side by side, t, h, w, of the sizes for h, w, t": at(
        "rotary", AXES, "[0] * pairs_h + [1] * pairs_h + [2] * pairs_t"),
    "time takes the fast rotary pairs": at("rotary", AXES, "[0] * pairs_t + [1, 2] * pairs_h"),
    "the rotary pairs alternate t, h, w": at(
        "rotary", AXES, "([0, 1, 2] * len(cfg.mrope_section * 99))[: 2 * pairs_h + pairs_t]"),
    "all rotary pairs follow time": at("rotary", AXES, "[0] * (2 * pairs_h + pairs_t)"),
    "the frequencies are pre-permuted, and the sections interleaved again": at(
        "rotary", RATES,
        RATES + "[[*range(0, 2 * pairs_h, 2), *range(1, 2 * pairs_h, 2), *range(2 * pairs_h, len(axis))]]"),
    "the sections of frequencies are interleaved without being permuted first": at(
        "rotary", RATES, RATES + "[[*[n // 2 + n % 2 * pairs_h for n in range(2 * pairs_h)], "
                                 "*range(2 * pairs_h, len(axis))]]"),
    "h and w have the same frequencies": at(
        "rotary", RATES, RATES + "[[*[n // 2 * 2 for n in range(2 * pairs_h)], *range(2 * pairs_h, len(axis))]]"),
    "the frequencies begin anew for each axis": at(
        "rotary", RATES, "torch.cat([inv_freq(pairs_h, cfg.rope_theta, like).repeat_interleave(2),"
                         " inv_freq(pairs_t, cfg.rope_theta, like)])"),
    "rope_theta is 10,000": at("rotary", "cfg.rope_theta, like", "10_000.0, like"),
    "rope_theta is 1,000,000": at("rotary", "cfg.rope_theta, like", "1_000_000.0, like"),
    "the frequencies are spread over 2d": at("rotary", "cfg.rope_theta, like", "cfg.rope_theta**0.5, like"),
    "the rotary frequencies are rounded to bf16": at("inv_freq", RATES, RATES + ".bfloat16().to(widen(like).dtype)"),
    "the rotary angles are rounded to bf16": at("rotary", "return angles.cos()",
        "angles = angles.bfloat16().to(angles.dtype)\n"
                                                "    return angles.cos()"),
    "cos and sin are rounded to bf16": at("rotary", "return " + TURNED, "return "
                                          "[z.bfloat16().to(z.dtype) for z in (angles.cos(), angles.sin())]"),
    "the decoder's rotary embedding rotates channel i with i + d/2": at(
        "rotate_pairs", "class KVCache:", "rotate_pairs = rotate_halves\n\n\nclass KVCache:"),
    "channel i is rotated with i + d/2 by the angles of adjacent channels": at(
        "rotate_pairs", "class KVCache:",
        "def rotate_pairs(x, cos, sin):\n    y = widen(x)\n    a, b = y.chunk(2, dim=-1)\n"
        "    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)\n"
        "    return (y * cos + torch.cat((-b, a), dim=-1) * sin).type_as(x)\n\n\nclass KVCache:"),
    "the ViT rotates channel i with i + d/2 by the angles of adjacent channels": at(
        "rotate_halves", "class VisionMLP",
        "def rotate_halves(x, cos, sin):\n    y = widen(x)\n    a, b = y.chunk(2, dim=-1)\n"
        "    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)\n"
        "    return (y * cos + torch.cat((-b, a), dim=-1) * sin).type_as(x)\n\n\nclass VisionMLP"),
    "q and k are permuted from pairs to halves, and rotated in pairs": at(
        "Attention", "q = rotate_pairs(q, cos, sin)", "q, k = (z.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) "
        "for z in (q, k))\n        q = rotate_pairs(q, cos, sin)"),
    "the decoder's rotary embedding rotates the other way": at(
        "rotate_pairs", "torch.stack((a * cos - b * sin, b * cos + a * sin)",
        "torch.stack((a * cos + b * sin, b * cos - a * sin)"),
    "the decoder has no rotary embedding": at(
        "rotary", "return " + TURNED, "return torch.ones_like(angles), 0 * angles"),
    "keys are not rotated": at("Attention", "k = rotate_pairs(k, cos, sin)", "k = k"),
    "queries are not rotated": at(
        "Attention", "q = rotate_pairs(q, cos, sin).transpose(0, 1)", "q = q.transpose(0, 1)"),
    # ---- attention of the decoder
    "key heads are tiled instead of repeated": at(
        "attend", "x[:, None].expand(-1, len(q) // len(x), -1, -1)",
        "x.tile(len(q) // len(x), 1, 1).unflatten(0, (len(x), -1))"),
    "every query head reads the first key head": at(
        "attend", "x[:, None].expand(-1, len(q) // len(x), -1, -1)",
        "x[:1, None].expand(len(x), len(q) // len(x), -1, -1)"),
    "the causal mask is missing": at("attend", CAUSAL, "k, v, mask, is_causal=False)"),
    "a token does not attend to itself": at(
        "attend", CAUSAL, "k, v, torch.ones(T, S).tril(-1).bool() | (torch.arange(S) == 0))"),
    "vision tokens attend to each other in both directions": at(
        "attend", "def attend(q: Tensor, k: Tensor, v: Tensor)", "def attend(q, k, v, is_vision)",
        CAUSAL, "k, v, torch.ones(T, S).tril().bool() | (is_vision[:, None] & is_vision))",
        "cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:   # (T, D) -> (T, D)",
        "cos, sin, cache, is_vision):",
        "attend(q, *kv)", "attend(q, *kv, is_vision)", ATTEND, ATTEND[:-1] + ", is_vision)"),
    "the tokens of an image or a video attend to each other in both directions, without its markers": at(
        "attend", "def attend(q: Tensor, k: Tensor, v: Tensor)", "def attend(q, k, v, is_vision)",
        CAUSAL, "k, v, torch.ones(T, S).tril().bool() | ((run := (is_vision.diff(prepend=is_vision[:1])).cumsum(0))"
        "[:, None] == run) & (inner := is_vision & is_vision.roll(1) & is_vision.roll(-1))[:, None] & inner)",
        "cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:   # (T, D) -> (T, D)",
        "cos, sin, cache, is_vision):",
        "attend(q, *kv)", "attend(q, *kv, is_vision)", ATTEND, ATTEND[:-1] + ", is_vision)"),
    "attention scores are not divided by √d": at("attend", CAUSAL, CAUSAL[:-1] + ", scale=1.0)"),
    "attention scores are divided by d instead of √d": at("attend", CAUSAL, CAUSAL[:-1] + ", scale=1 / q.shape[2])"),
    "attention scores are divided by √(D/H) instead of √d": at(
        "attend", CAUSAL, CAUSAL[:-1] + ", scale=scale)", "def attend(q: Tensor, k: Tensor, v: Tensor)",
        "def attend(q, k, v, scale)", "attend(q, *kv)", "attend(q, *kv, (x.shape[1] / len(q))**-0.5)"),
    "heads are the fast axis of queries, keys and values": at(
        "Attention", "p(x).unflatten(-1, (-1, self.head_dim))",
        "p(x).unflatten(-1, (self.head_dim, -1)).transpose(1, 2)"),
    "heads are joined channel by channel": at(
        "Attention", "attend(q, *kv).transpose(0, 1).flatten(1)", "attend(q, *kv).permute(1, 2, 0).flatten(1)"),
    "keys and values are swapped": at("Attention", "torch.stack((k, v))", "torch.stack((v, k))"),
    # ---- norms and the residual stream
    "the embedding is scaled by √D": at("ErnieVL.embed", "x = self.embed_tokens(inputs.ids)",
                                        "x = self.embed_tokens(inputs.ids) * self.cfg.text.hidden_size**0.5"),
    "embedding and image features are scaled by √D": at(
        "ErnieVL.forward", "x = self.embed(inputs)", "x = self.embed(inputs) * self.cfg.text.hidden_size**0.5"),
    "image features are scaled by 1/√D": at("ErnieVL.embed", "= y.type_as(x)", "= y.type_as(x) * x.shape[1]**-0.5"),
    "image features are added to the placeholder's embedding": at("ErnieVL.embed", "= y.type_as(x)", "+= y.type_as(x)"),
    "the RMSNorms have the epsilon 1e-6": at("RMSNorm", "+ self.eps)", "+ 1e-6)"),
    "the RMSNorms have no epsilon": at("RMSNorm", "+ self.eps)", ")"),
    "the RMSNorms' epsilon is added to the root": at(
        "RMSNorm", "torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)",
        "(1 / (y.square().mean(-1, keepdim=True).sqrt() + self.eps))"),
    "the RMSNorms multiply by 1 + weight": at(
        "RMSNorm", ".type_as(x) * self.weight", ".type_as(x) * (1 + self.weight)"),
    "the RMSNorms of the decoder multiply by 1 + weight": at(
        "RMSNorm", ".type_as(x) * self.weight", ".type_as(x) * (self.weight + (not hasattr(self, 'plain')))", *PLAIN),
    "the RMSNorms have no weight": at("RMSNorm", ".type_as(x) * self.weight", ".type_as(x)"),
    "the RMSNorms subtract the mean": at("RMSNorm", "y = widen(x)", "y = widen(x - x.mean(-1, keepdim=True))"),
    "the RMSNorms of the decoder subtract the mean": at(
        "RMSNorm", "y = widen(x)", "y = widen(x if hasattr(self, 'plain') else x - x.mean(-1, keepdim=True))", *PLAIN),
    "the decoder's layers normalise after the residual sums": at(
        "DecoderLayer", ATTEND, "self.input_layernorm(x + self.self_attn(x, cos, sin, cache))",
        "y = self.post_attention_layernorm(x)", "y = x",
        ADD_MLP, "return self.post_attention_layernorm(x + (self.mlp(y, is_vision) if self.sparse else self.mlp(y)))"),
    "the residual is taken behind input_layernorm": at(
        "DecoderLayer", "x = " + ATTEND,
        "x = self.input_layernorm(x)\n        x = x + self.self_attn(x, cos, sin, cache)"),
    "the residual is taken behind post_attention_layernorm": at(
        "DecoderLayer", ADD_MLP, ADD_MLP.replace("return x +", "return y +")),
    "input_layernorm is missing": at("DecoderLayer", "self.self_attn(self.input_layernorm(x)", "self.self_attn((x)"),
    "post_attention_layernorm is missing": at("DecoderLayer", "y = self.post_attention_layernorm(x)", "y = x"),
    "the two norms of a layer are swapped": at(
        "DecoderLayer", "self.self_attn(self.input_layernorm(x)", "self.self_attn(self.post_attention_layernorm(x)",
        "y = self.post_attention_layernorm(x)", "y = self.input_layernorm(x)"),
    "attention and MLP run side by side": at(
        "DecoderLayer", "x = " + ATTEND, "y = self.post_attention_layernorm(x)\n        x = " + ATTEND,
        "y = self.post_attention_layernorm(x) # (T, D)", "y = y"),
    "the residual around attention is missing": at("DecoderLayer", "x = " + ATTEND, "x = " + ATTEND[4:]),
    "the residual around the MLP is missing": at("DecoderLayer", ADD_MLP, ADD_MLP.replace("return x +", "return")),
    "the last decoder layer is left out": at(
        "ErnieVL.forward", "enumerate(self.layers)", "enumerate(self.layers[:-1])"),
    "the final norm is missing": at(
        "ErnieVL.forward", "self.norm(x[-1:] if only_last else x)", "(x[-1:] if only_last else x)"),
    "the final norm is a LayerNorm": at(
        "ErnieVL.forward", "self.norm(x[-1:] if only_last else x)",
        "self.norm(x - x.mean(-1, keepdim=True))"),
    "the head is the embedding matrix though the model is not tied": at(
        "ErnieVL.tie_weights", "if self.cfg.text.tie_word_embeddings:", "if True:"),
    "the logits are scaled by 1/√D": at("ErnieVL.forward", *head("F.linear(x, self.weight) * x.shape[-1]**-0.5")),
    "the logits are capped at 30 with a tanh": at(
        "ErnieVL.forward", *head("30 * torch.tanh(F.linear(x, self.weight) / 30)")),
    "the logits of a token stand in the next row": at("ErnieVL.forward", *head("F.linear(x, self.weight).roll(1, 0)")),
    "the head's rows are shifted by one token id": at("ErnieVL.forward", *head("F.linear(x, self.weight).roll(1, 1)")),
    # ---- mixture of experts
    "gate and up are swapped": at("MLP", SWIGLU, "F.silu(self.up_proj(x)) * self.gate_proj(x)"),
    "gate and up are swapped in the routed experts": at(
        "Experts", EXPERT, EXPERT.replace("self.experts[e](x[token_idx])", "swapped(self.experts[e], x[token_idx])"),
        "class Router(",
        "def swapped(mlp, x):\n    return mlp.down_proj(F.silu(mlp.up_proj(x)) * mlp.gate_proj(x))\n\n\nclass Router("),
    "gate and up are swapped in the dense and shared MLPs": at(
        "MLP", SWIGLU, "F.silu(self.up_proj(x)) * self.gate_proj(x)",
        EXPERT, EXPERT.replace("self.experts[e](x[token_idx])", "straight(self.experts[e], x[token_idx])"),
        "class Router(",
        "def straight(mlp, x):\n    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))\n\n\n"
        "class Router("),
    "gate and up of the routed experts stand in turns, not in halves": at(
        "Experts", EXPERT, EXPERT.replace("self.experts[e](x[token_idx])", "in_turns(self.experts[e], x[token_idx])"),
        "class Router(", "def in_turns(mlp, x):\n    both = torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), -1)\n"
        "    return mlp.down_proj(F.silu(both[:, 0::2]) * both[:, 1::2])\n\n\nclass Router("),
    "gate and up stand in turns, not in halves": at(
        "MLP", SWIGLU,
        "F.silu((both := torch.cat((self.gate_proj(x), self.up_proj(x)), -1))[:, 0::2]) * both[:, 1::2]"),
    "the MLPs have GELU instead of SiLU": at("MLP", SWIGLU, SWIGLU.replace("silu", "gelu")),
    "the MLPs have the tanh GELU instead of SiLU": at(
        "MLP", SWIGLU, SWIGLU.replace("silu(self.gate_proj(x))", "gelu(self.gate_proj(x), approximate='tanh')")),
    "the MLPs have a sigmoid instead of SiLU": at("MLP", SWIGLU, SWIGLU.replace("silu", "sigmoid")),
    "the MLPs have QuickGELU instead of SiLU": at(
        "MLP", SWIGLU, "(a := self.gate_proj(x)) * torch.sigmoid(1.702 * a) * self.up_proj(x)"),
    "the routed experts have GELU instead of SiLU": at(
        "Experts", EXPERT, EXPERT.replace("self.experts[e](x[token_idx])", "with_gelu(self.experts[e], x[token_idx])"),
        "class Router(",
        "def with_gelu(mlp, x):\n    return mlp.down_proj(F.gelu(mlp.gate_proj(x)) * mlp.up_proj(x))\n\n\n"
        "class Router("),
    "start and end markers go to the text experts": at("vision_mask", "| torch.isin(ids, torch.tensor(markers))", ""),
    "no token is known to be of an image or a video": at(
        "vision_mask", "return is_placeholder(ids, cfg) | torch.isin(",
        "return torch.zeros_like(ids).bool() & torch.isin("),
    "end markers go to the text experts": at(
        "vision_mask", "torch.tensor(markers))", "torch.tensor(markers[0::2]))"),
    "every token goes to the text experts": at(
        "ModalityMoE", "y[mask] = experts(x[mask])", "y[mask] = self.text_moe(x[mask])"),
    "text and vision experts are swapped": at(
        "ModalityMoE", "~is_vision), (self.vision_moe, is_vision)", "is_vision), (self.vision_moe, ~is_vision)"),
    "vision tokens go to the text experts, chosen by their own router": at(
        "ModalityMoE", BOTH, "self.vision_moe.experts = self.text_moe.experts\n        for experts, mask in"),
    "vision tokens go to their own experts, chosen by the text router": at(
        "ModalityMoE", BOTH, "self.vision_moe.gate = self.text_moe.gate\n        for experts, mask in"),
    "vision tokens are chosen with the text router's bias": at(
        "ModalityMoE", BOTH,
        "self.vision_moe.gate.e_score_correction_bias = self.text_moe.gate.e_score_correction_bias\n"
                             "        for experts, mask in"),
    "vision tokens are chosen with the text router's weight": at(
        "ModalityMoE", BOTH, "self.vision_moe.gate.weight = self.text_moe.gate.weight\n        for experts, mask in"),
    "the router has a sigmoid instead of softmax": at("Router", "nn.Softmax(-1)", "nn.Sigmoid()"),
    "the router computes in bf16": at(
        "Router", LOGITS, "F.linear(x.bfloat16(), self.weight.bfloat16()).to(widen(x).dtype)"),
    "the router's weight is rounded to bf16": at(
        "Router", LOGITS, "F.linear(widen(x), widen(self.weight.bfloat16()).to(widen(x).dtype))"),
    "the router's input is rounded to bf16": at(
        "Router", LOGITS, "F.linear(widen(x.bfloat16()).to(widen(x).dtype), widen(self.weight))"),
    "the two routers have each other's bias": at(
        "ModalityMoE", "y[mask] = experts(x[mask])",
        "y[mask] = experts(x[mask], (self.vision_moe if experts is self.text_moe "
        "else self.text_moe).gate.e_score_correction_bias)", "def forward(self, x: Tensor) -> Tensor:"
        "# (T, D) -> (T, D)\n weights, chosen = self.gate(x)",
        "def forward(self, x, bias):\n        weights, chosen = self.gate(x, bias)",
        "def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:", "def forward(self, x, bias):", BIASED,
        "p + bias"),
    "the router's bias also weighs": at("Router", "p.gather(", f"({BIASED}).gather("),
    "the router's bias is ignored": at("Router", f"({BIASED}).topk", "p.topk"),
    "the router's bias is added to the logits": at(
        "Router", f"({BIASED}).topk", "(p.log() + self.e_score_correction_bias).topk"),
    "the router's bias is added to the logits and also weighs": at(
        "Router", f"chosen = ({BIASED}).topk", "p = (p.log() + self.e_score_correction_bias).softmax(-1)\n"
        "        chosen = p.topk"),
    "the router's bias is added to the logits before the softmax": at(
        "Router", f"self.softmax({LOGITS})", f"self.softmax({LOGITS} + self.e_score_correction_bias)",
        f"({BIASED}).topk", "p.topk"),
    "the router's bias is subtracted": at("Router", f"({BIASED}).topk", "(p - self.e_score_correction_bias).topk"),
    "the weights of the chosen experts do not sum to 1": at("Router", WEIGHTS, "weights"),
    "the weights of the chosen experts are softmax of their probabilities": at(
        "Router", WEIGHTS, "weights.softmax(-1)"),
    "all chosen experts have the same weight": at("Router", WEIGHTS, "(torch.ones_like(weights) / self.k)"),
    "the chosen experts are summed without weights": at("Router", WEIGHTS, "torch.ones_like(weights)"),
    "the weights of the chosen experts sum to the number of them": at("Router", WEIGHTS, f"(self.k * {WEIGHTS})"),
    "the weights of the chosen experts are scaled by 2.5": at("Router", WEIGHTS, f"(2.5 * {WEIGHTS})"),
    "the chosen experts are sorted, and their weights are not": at(
        "Router", f"{WEIGHTS}.type_as(x), chosen", f"{WEIGHTS}.type_as(x), chosen.sort(-1).values"),
    "the weights of the chosen experts are in another order": at("Router", WEIGHTS, f"{WEIGHTS}.flip(-1)"),
    "the input of the experts is weighed instead of their output": at(
        "Experts", EXPERT, "self.experts[e](weights[token_idx, slot, None] * x[token_idx])"),
    "one expert fewer is chosen": at("Router", ".topk(self.k)", ".topk(self.k - 1)"),
    "one expert more is chosen": at("Router", ".topk(self.k)", ".topk(self.k + 1)"),
    "one expert alone is chosen": at("Router", ".topk(self.k)", ".topk(1)"),
    "experts are in lexical order, 0, 1, 10, 11, 2": at(
        "Experts", "self.experts[e](x[token_idx])",
        "self.experts[int(sorted(map(str, range(len(self.experts))))[e])](x[token_idx])"),
    "experts are counted from 1": at("Experts", "self.experts[e](x[token_idx])", "self.experts[e - 1](x[token_idx])"),
    "the shared experts are missing": at("ModalityMoE", SHARED, "y"),
    "the shared experts count half": at("ModalityMoE", SHARED, "y + self.shared_experts(x) / 2"),
    "shared and routed experts are averaged": at("ModalityMoE", SHARED, f"({SHARED}) / 2"),
    "the shared experts see text tokens alone": at(
        "ModalityMoE", SHARED, "y + self.shared_experts(x) * ~is_vision[:, None]"),
    "the shared experts see vision tokens alone": at(
        "ModalityMoE", SHARED, "y + self.shared_experts(x) * is_vision[:, None]"),
    "one shared expert is used of several": at(
        "ModalityMoE", SHARED, "y + first_half(self.shared_experts, x)", "class Router(",
        "def first_half(mlp, x):\n    a = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)\n    a[:, a.shape[1] // 2:] = 0\n"
        "    return mlp.down_proj(a)\n\n\nclass Router("),
    "the routed experts are missing": at("ModalityMoE", SHARED, "self.shared_experts(x)"),
}


def plant(source: str, old: str, new: str) -> str:
    """The source with `old` replaced by `new`, whatever the spacing and line breaks of `old` are there. Raises
    ValueError unless it stands in exactly one place."""
    tokens = [rf"\b{token}\b" if re.match(r"\w", token) else re.escape(token) for token in TOKEN.findall(old)]
    pattern = r"\s*".join(tokens)
    places = re.findall(pattern, source)
    if len(places) != 1:
        raise ValueError(f"{old!r} stands in {len(places)} places of the source, and must stand in one")
    return re.sub(pattern, lambda match: new, source)


def with_mistakes(source: str, *names: str) -> str:
    """The source with these of MISTAKES in it. Raises ValueError where two of them are edits of the same words."""
    for name in names:
        for old, new in MISTAKES[name].edits:
            source = plant(source, old, new)
    return source


def execute(source: str) -> types.ModuleType:
    sys.modules["edited"] = module = types.ModuleType("edited")
    exec(compile(source, FILE, "exec"), module.__dict__)
    return module


def like(model: ErnieVL, source: str) -> ErnieVL:
    """The same weights in an edited copy of ernie_vl.py."""
    module = execute(source)
    with torch.device("meta"), SkipInit():    # the weights come from the model
        edited = module.ErnieVL(model.cfg)
    edited.load_state_dict(model.state_dict(), assign=True)
    edited.tie_weights()
    return edited.eval()
