"""ERNIE-4.5-VL in one file: a vision-language mixture of experts. Tensors in, tensors out.

    picture, clip ──> patches ──> VisionTransformer ──> Resampler ──┐
                                                                    ├──> tokens ──> DecoderLayers ──> logits ──> generate
    text ──> ids ──> embed_tokens ──────────────────────────────────┘      │
                                                     (t, h, w) positions ──┘

Start reading at `ErnieVL.forward`, near the end: it is the drawing above. The definitions stand in the order of the data,
and modules are named as in the released checkpoints (the table in `load_weights.py` says where not).

Letters used in every shape comment (a test runs the model and checks the comments against the live tensors):

    T  tokens given to this pass    S  tokens seen so far, T included    V  vocabulary
    D  decoder width                H  query heads                       G  key/value heads     d  width of a head
    E  experts of one modality      K  experts chosen for a token        C  ViT width (inside it, H and d are its own)
    N  patches of all pictures      M  pictures and clips                P  numbers in a patch (3 colours x 14 x 14)
    t, h, w  frames, rows and columns of one picture or clip: in patches in the ViT, in tokens in the decoder

There is no batch dimension: one conversation at a time. The model keeps no state: the KV cache is an argument.
The released checkpoints come through `load_weights.py`; text and pictures become tensors in `tokenizer.py`.
License: Apache-2.0. Technical report: https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf
"""
import hashlib
import math
from dataclasses import dataclass
from typing import Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14              # a patch is 14 x 14 pixels
SPATIAL_MERGE = 2       # the resampler joins 2 x 2 patches, so picture sides are multiples of 28 pixels ...
TEMPORAL_MERGE = 2      # ... and then 2 consecutive frames of a clip
LAYER_NORM_EPS = 1e-6   # of the ViT and the resampler; the decoder's RMSNorms have their own, from the config
VISION_ROPE_THETA = 10_000.0
CHUNK = 2048            # tokens of a prompt that go through the decoder at a time
VIT_BATCH = 32_768      # patches that go through the ViT at a time; the largest picture has 24,708


class InputError(ValueError):
    """Something that was given cannot be used. The message is one sentence that says what to do about it."""


# ------------------------------------------------------------------------------------------ 1. configuration
# Field names are the keys of the released config.json files; load_weights.py reads both of their layouts.
# What has one value in every released model is a constant above, and the loader checks that the file agrees.
@dataclass(frozen=True)
class VisionConfig:
    depth: int                             # number of blocks
    hidden_size: int                       # C
    intermediate_size: int                 # width inside the MLP of a block
    num_heads: int


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int                        # V
    hidden_size: int                       # D
    intermediate_size: int                 # width of the dense layers
    num_attention_heads: int               # H
    num_key_value_heads: int               # G
    head_dim: int                          # d
    max_position_embeddings: int           # longest context, in tokens
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]    # rotary pairs that follow (h, w, t); together d/2
    tie_word_embeddings: bool              # the head is the embedding matrix
    mlp_layer_types: tuple[str, ...]       # "dense" or "sparse", one for every layer
    moe_num_experts: int                   # E
    moe_intermediate_size: tuple[int, ...] # inner width of (text, vision) experts; text-only models have the first alone
    moe_k: int                             # K
    moe_num_shared_experts: int            # they are one MLP, so many text experts wide; 0: none


@dataclass(frozen=True)
class Config:
    text: TextConfig
    vision: VisionConfig | None            # None: a text-only relative
    image_token_id: int                    # placeholder of one merged patch of a picture
    video_token_id: int                    # the same for a clip; the released prompts use image_token_id there too
    image_start_token_id: int
    image_end_token_id: int
    video_start_token_id: int
    video_end_token_id: int


# ---------------------------------------------------------------------------------------- 2. vision transformer
def frequencies(pairs: int, theta: float, device: torch.device) -> Tensor:             # -> (pairs,)
    """Turning speeds of rotary pairs, fast to slow. In fp32 and always on the CPU: fp64, or the power function of a GPU, would
    give speeds that differ in the last digit, which is up to 0.005 rad at position 100,000."""
    return (1.0 / theta ** (torch.arange(pairs, dtype=torch.float32, device="cpu") / pairs)).to(device)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:                      # (N, H, d) -> (N, H, d)
    """Rotary embedding of the ViT. Channel i turns with channel i + d/2:    0 1 2 3 | 4 5 6 7
                                                                             └────────┘  one pair"""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class VisionAttention(nn.Module):
    """A patch sees every patch of its own frame and no other. Frames are split, not masked: a mask would be N x N."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, frames: list[int]) -> Tensor:   # (N, C) -> (N, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)             # (N, H, d), (N, H, d), (N, H, d)
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)                      # (N, H, d), (N, H, d)
        of_frames = zip(*(z.transpose(0, 1)[None].split(frames, dim=2) for z in (q, k, v)))    # 3 x (1, H, h*w, d) each
        y = torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in of_frames], dim=2)[0]   # (H, N, d)
        return self.proj(y.transpose(0, 1).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:                                                # (N, C) -> (N, C)
        a = self.fc1(x)
        return self.fc2(a * torch.sigmoid(1.702 * a))                                      # QuickGELU


class VisionBlock(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.hidden_size, LAYER_NORM_EPS)
        self.attn = VisionAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.hidden_size, LAYER_NORM_EPS)
        self.mlp = VisionMLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, frames: list[int]) -> Tensor:   # (N, C) -> (N, C)
        x = x + self.attn(self.norm1(x), cos, sin, frames)
        return x + self.mlp(self.norm2(x))


def patch_cells(h: int, w: int) -> Tensor:                                                 # -> (h*w, 2)
    """(row, column) of every patch of a frame, in the order patches arrive: the four of a 2 x 2 block side by side,

         0  1 |  4  5         so that the resampler can join them by a plain reshape.
         2  3 |  6  7
        ------+------"""
    cells = torch.cartesian_prod(torch.arange(h), torch.arange(w))                         # (h*w, 2)
    blocks = cells.view(h // SPATIAL_MERGE, SPATIAL_MERGE, w // SPATIAL_MERGE, SPATIAL_MERGE, 2)
    return blocks.transpose(1, 2).reshape(h * w, 2)


class VisionTransformer(nn.Module):
    """Patches of all pictures and clips in one call. Of the rotary pairs of a head the first half turns with the patch's
    row, the second with its column."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.head_dim = cfg.hidden_size // cfg.num_heads
        self.patch_embed = nn.Linear(3 * PATCH * PATCH, cfg.hidden_size, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth))
        self.ln = nn.LayerNorm(cfg.hidden_size, LAYER_NORM_EPS)

    def angles(self, grids: list[tuple]) -> Tensor:                                        # -> (N, d/2)
        frequency = frequencies(self.head_dim // 4, VISION_ROPE_THETA, self.ln.weight.device)
        cells = [patch_cells(h, w).repeat(t, 1) for t, h, w in grids]    # no axis for time: frames share their angles
        return (torch.cat(cells).to(frequency.device)[..., None] * frequency).flatten(1)

    def forward(self, patches: Tensor, grids: list[tuple]) -> Tensor:                      # (N, P) -> (N, C)
        angles = self.angles(grids)[:, None]                                               # (N, 1, d/2)
        cos, sin = angles.cos(), angles.sin()
        frames = [h * w for t, h, w in grids for _ in range(t)]
        x = self.patch_embed(patches.type_as(self.patch_embed.weight))                     # (N, C)
        for block in self.blocks:
            x = block(x, cos, sin, frames)
        return self.ln(x)


# ---------------------------------------------------------------------------- 3. variable-resolution resampler
def merge_mlp(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_out), nn.GELU(), nn.Linear(n_out, n_out), nn.LayerNorm(n_out, LAYER_NORM_EPS))


def merged(grid: tuple) -> tuple[int, int, int]:
    """Grid of patches -> grid of tokens: (1, 34, 46) -> (1, 17, 23) for a picture, (8, 4, 4) -> (4, 2, 2) for a clip."""
    t, h, w = grid
    return max(1, t // TEMPORAL_MERGE), h // SPATIAL_MERGE, w // SPATIAL_MERGE


class Resampler(nn.Module):
    """4 neighbouring patches -> 1, then 2 consecutive frames -> 1 (a picture is paired with itself), then to the
    decoder's width. A larger picture has more patches and makes more tokens; nothing is squeezed into a fixed number."""

    def __init__(self, cfg: VisionConfig, width: int, eps: float):
        super().__init__()
        self.width = SPATIAL_MERGE**2 * cfg.hidden_size
        self.spatial_linear = merge_mlp(self.width, self.width)
        self.temporal_linear = merge_mlp(TEMPORAL_MERGE * self.width, self.width)
        self.mlp = nn.Linear(self.width, width)
        self.after_norm = RMSNorm(width, eps)

    def forward(self, x: Tensor, grids: list[tuple]) -> Tensor:                            # (N, C) -> (tokens, D)
        x = self.spatial_linear(x.reshape(-1, self.width))                                 # (N/4, 4C)
        clips = x.split([t * h * w // SPATIAL_MERGE**2 for t, h, w in grids])
        pairs = torch.cat([self.pair_frames(clip, grid) for clip, grid in zip(clips, grids)])    # (tokens, 8C)
        return self.after_norm(self.mlp(self.temporal_linear(pairs)))

    def pair_frames(self, clip: Tensor, grid: tuple) -> Tensor:                            # -> (tokens, 8C)
        frames = clip.view(grid[0], -1, self.width)                                        # (t, h*w/4, 4C)
        even, odd = (frames, frames) if grid[0] == 1 else (frames[0::2], frames[1::2])
        return torch.cat((even, odd), dim=-1).flatten(0, 1)


# ------------------------------------------------------------------------- 4. positions on three axes, and rotary
def positions(ids: Tensor, grids: list[tuple], cfg: Config, rule: str = "official") -> Tensor:    # (T,) -> (3, T)
    """Time, row and column of every token. Text walks the diagonal; a picture spreads out its rows and columns, and
    text continues after the largest number that was used:

             a  b  <start>  . . . . . .  <end>  c           . is a placeholder of a picture of 2 x 3 tokens
        t    0  1     2     3 3 3 3 3 3    6    7
        h    0  1     2     3 3 3 4 4 4    6    7
        w    0  1     2     3 4 5 3 4 5    6    7

    rule "hf_5_23" leaves time out of that largest number, as transformers 5.23 does. It differs after a clip with more
    frames than rows and columns, counted in tokens."""
    slots = is_placeholder(ids, cfg).nonzero().flatten().tolist()
    out, done, start = [], 0, 0                                  # tokens placed so far, and the next free position
    for grid in map(merged, grids):
        t, h, w = grid
        tokens, slots = slots[: t * h * w], slots[t * h * w :]
        out.append(torch.arange(start, start + tokens[0] - done).expand(3, -1))          # the text before it
        start += tokens[0] - done
        out.append(torch.cartesian_prod(*map(torch.arange, grid)).T + start)             # the picture
        start += max(grid[1:] if rule == "hf_5_23" else grid)
        done = tokens[-1] + 1
    out.append(torch.arange(start, start + len(ids) - done).expand(3, -1))
    return torch.cat(out, dim=1)


def is_placeholder(ids: Tensor, cfg: Config) -> Tensor:                                    # (T,) -> (T,)
    return (ids == cfg.image_token_id) | (ids == cfg.video_token_id)


def is_vision(ids: Tensor, cfg: Config) -> Tensor:                                         # (T,) -> (T,)
    """Which tokens of a prompt go to the vision experts: placeholders, and the start and end markers around them, because
    Baidu's processor labels the markers so in training."""
    markers = (cfg.image_start_token_id, cfg.image_end_token_id, cfg.video_start_token_id, cfg.video_end_token_id)
    return is_placeholder(ids, cfg) | torch.isin(ids, torch.tensor(markers))


def rope_angles(positions: Tensor, cfg: TextConfig) -> Tensor:                             # (3, T) -> (T, d/2)
    """Which axis a rotary pair follows is data: the fast pairs alternate h w h w ..., the slow ones follow time.
    Text has the same number on all axes, so for text this is ordinary rotary embedding."""
    rows, _, times = cfg.mrope_section                           # as many for rows as for columns, so they alternate
    axis = [1, 2] * rows + [0] * times                           # 22 x (h, w), then 20 x t in the released models
    return positions[axis].T.float() * frequencies(len(axis), cfg.rope_theta, positions.device)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:                           # (T, H, d) -> (T, H, d)
    """Rotary embedding of the decoder. Channel 2i turns with channel 2i + 1:    0 1 | 2 3 | 4 5 | 6 7
                                                                                 └─┘  one pair"""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).type_as(x)


# ---------------------------------------------------------------------------------------------------- 5. decoder
class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:                                                # (T, D) -> (T, D)
        y = x.float()                        # a mean of D squares loses digits in bf16
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class KVCache:
    """What one layer remembers: rotated keys and plain values, in a buffer that grows by half when it is full. Written in
    place, so for inference only."""

    def __init__(self):
        self.length, self.buffer = 0, None

    def append(self, kv: Tensor) -> Tensor:                                                # (2, G, T, d) -> (2, G, S, d)
        past, self.length = self.length, self.length + kv.shape[2]
        if self.buffer is None:
            self.buffer = kv[:, :, :0]
        if self.length > self.buffer.shape[2]:
            grown = kv.new_empty(*kv.shape[:2], self.length * 3 // 2 + 64, kv.shape[3])
            grown[:, :, :past] = self.buffer[:, :, :past]
            self.buffer = grown
        self.buffer[:, :, past : self.length] = kv
        return self.buffer[:, :, : self.length]


class Cache:
    """What a conversation has computed so far: keys and values of every layer, and a mark for every token of it, by which
    the next prompt finds out how much of it is there already (see `ErnieVL.marks`)."""

    def __init__(self, layers: int):
        self.layers, self.marks = [KVCache() for _ in range(layers)], []

    def keep(self, marks: list) -> int:
        """Forgets all but what a prompt with these marks begins with, and returns the length of that. The prompt's last token
        is never in it, since its logits are wanted, nor half a picture, whose tokens all have one mark."""
        same = 0
        while same < min(len(self.marks), len(marks) - 1) and self.marks[same] == marks[same]:
            same += 1
        while same and marks[same] == marks[same - 1]:
            same -= 1
        self.marks = self.marks[:same]
        for layer in self.layers:
            layer.length = same
        return same


class Attention(nn.Module):
    """Grouped queries: H query heads share G keys and values. A token sees itself and everything before it."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:   # (T, D) -> (T, D)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate_pairs(q, cos, sin).transpose(0, 1)                                      # (H, T, d)
        k = rotate_pairs(k, cos, sin)                                                      # (T, G, d)
        kv = torch.stack((k, v)).transpose(1, 2)                                           # (2, G, T, d)
        if cache is not None:
            kv = cache.append(kv)                                                          # (2, G, S, d)
        return self.o_proj(attend(q, *kv).transpose(0, 1).flatten(1))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:              # (H, T, d), (G, S, d), (G, S, d) -> (H, T, d)
    """softmax(q kᵀ / √d) v, where the query head j reads the key head ⌊j / (H/G)⌋."""
    T, S = q.shape[1], k.shape[1]
    if T == 1:
        # One new token sees every key, so no mask is needed, and the H/G heads of a group become the rows of one product.
        # Without this, keys and values would be copied for every query head: most of a step's time at long contexts.
        return F.scaled_dot_product_attention(q.reshape(1, len(k), -1, q.shape[2]), k[None], v[None]).reshape(q.shape)
    # is_causal lets query 0 see key 0 alone; behind a cache query 0 stands S - T keys later
    mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    k, v = (z[:, None].expand(-1, len(q) // len(z), -1, -1) for z in (k, v))               # (G, H/G, S, d), without a copy
    return F.scaled_dot_product_attention(q.view(*k.shape[:2], T, -1), k, v, mask, is_causal=T == S).flatten(0, 1)


class MLP(nn.Module):
    """SwiGLU. One and the same as dense layer, as shared expert and as routed expert."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:                                                # (T, D) -> (T, D)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses K experts per token. A bias, learned for balance, helps to choose but never to weigh. In fp32 whatever the
    model's dtype: rounding would choose other experts where scores are close."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.k = cfg.moe_k
        self.weight = nn.Parameter(torch.empty(cfg.moe_num_experts, cfg.hidden_size))      # the loader fills it
        self.e_score_correction_bias = nn.Parameter(torch.zeros(cfg.moe_num_experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:                                 # (T, D) -> (T, K), (T, K)
        scores = F.linear(x.float(), self.weight.float()).softmax(-1)                      # (T, E)
        chosen = (scores + self.e_score_correction_bias).topk(self.k).indices              # (T, K)  the bias votes ...
        weights = scores.gather(-1, chosen)                                                # (T, K)  ... but has no weight
        return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)).type_as(x), chosen


class Experts(nn.Module):
    """The experts of one modality and their router; it is called with the tokens of this modality alone. A chosen expert
    runs once, on all tokens that chose it; the others are not touched, so memory-mapped weights stay on disk."""

    def __init__(self, cfg: TextConfig, hidden: int):
        super().__init__()
        self.gate = Router(cfg)
        self.experts = nn.ModuleList(MLP(cfg.hidden_size, hidden) for _ in range(cfg.moe_num_experts))

    def forward(self, x: Tensor) -> Tensor:                                                # (T, D) -> (T, D)
        weights, chosen = self.gate(x)
        if len(x) == 1:      # a generated token: sorting by expert, as below, would take as long as small products
            return sum(w * self.experts[e](x) for w, e in zip(weights[0], chosen[0].tolist()))
        y = torch.zeros_like(x)                                                            # (T, D)
        for e in chosen.unique().tolist():
            token, slot = torch.where(chosen == e)
            y[token] += weights[token, slot, None] * self.experts[e](x[token])
        return y


class ModalityMoE(nn.Module):
    """Text tokens go to text experts, vision tokens to (narrower) vision experts, everyone to the shared experts."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        text, *vision = cfg.moe_intermediate_size
        shared = cfg.moe_num_shared_experts * text
        self.text_moe = Experts(cfg, text)
        self.vision_moe = Experts(cfg, *vision) if vision else None                        # None in text-only models
        self.shared_experts = MLP(cfg.hidden_size, shared) if shared else None             # None in the 424B and 300B

    def forward(self, x: Tensor, is_vision: Tensor) -> Tensor:                             # (T, D), (T,) -> (T, D)
        y = torch.zeros_like(x)                                                            # (T, D)
        for experts, mine in ((self.text_moe, ~is_vision), (self.vision_moe, is_vision)):
            if mine.any():
                y[mine] = experts(x[mine])
        return y if self.shared_experts is None else y + self.shared_experts(x)


class DecoderLayer(nn.Module):
    """Pre-norm: attention, then an MLP: dense in the first layers, of experts in the others."""

    def __init__(self, cfg: TextConfig, kind: str):
        super().__init__()
        self.sparse = kind == "sparse"
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = ModalityMoE(cfg) if self.sparse else MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, is_vision: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)                   # (T, D)
        y = self.post_attention_layernorm(x)                                               # (T, D)
        return x + (self.mlp(y, is_vision) if self.sparse else self.mlp(y))


# ------------------------------------------------------------------------------------------- 6. the whole model
class Inputs(NamedTuple):
    """What one forward pass reads. `ErnieVL.prepare` makes it from a prompt."""

    ids: Tensor            # (T,)
    positions: Tensor      # (3, T): time, row, column
    is_vision: Tensor      # (T,) bool: goes to the vision experts
    patches: Tensor        # (N, P): pictures and clips in the order of the prompt
    grids: list[tuple]     # M times (t, h, w), counted in patches; t is 1 for a picture and an even number for a clip


class ErnieVL(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        text, self.cfg = cfg.text, cfg
        self.vision_model = VisionTransformer(cfg.vision) if cfg.vision else None
        self.resampler_model = Resampler(cfg.vision, text.hidden_size, text.rms_norm_eps) if cfg.vision else None
        # from_pretrained, because nn.Embedding's own random numbers cost a second on the meta device, and are not needed
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(text.vocab_size, text.hidden_size), freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(text, kind) for kind in text.mlp_layer_types)
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head = None if text.tie_word_embeddings else nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def forward(self, inputs: Inputs, cache: Cache | None = None, only_last: bool = False) -> Tensor:
        """Logits of every token, (T, V), or of the last one alone, (1, V). A cache from `new_cache` is extended in place;
        `inputs` are then the tokens that follow what it holds, with positions that go on counting (see `rest`)."""
        x = self.embed(inputs)                                                             # (T, D)
        angles = rope_angles(inputs.positions, self.cfg.text)[:, None]                     # (T, 1, d/2)  for all layers
        # a long prompt goes through the layers in chunks, so that little of what they need beside the cache grows with it
        whole, out = (x, angles.cos(), angles.sin(), inputs.is_vision), []
        for x, cos, sin, is_vision in zip(*(y.split(CHUNK if cache else len(x)) for y in whole)):
            for layer, kv in zip(self.layers, cache.layers if cache else [None] * len(self.layers), strict=True):
                x = layer(x, cos, sin, is_vision, kv)                                      # (T, D)
            out = [x[-1:]] if only_last else [*out, x]
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(self.norm(torch.cat(out)), head.weight)

    def embed(self, inputs: Inputs) -> Tensor:                                             # -> (T, D)
        """Embeddings of the tokens, with the placeholders' rows overwritten by what the pictures look like."""
        x = self.embed_tokens(inputs.ids)                                                  # (T, D)
        if inputs.grids:
            x[is_placeholder(inputs.ids, self.cfg)] = self.see(inputs.patches, inputs.grids).type_as(x)
        return x

    def see(self, patches: Tensor, grids: list[tuple]) -> Tensor:                          # (N, P) -> (tokens, D)
        """Pictures, and pairs of frames of a clip, do not see one another, so they go through in batches of about one large
        picture, and a long clip needs no more memory than that."""
        pairs = [(min(t, TEMPORAL_MERGE), h, w) for t, h, w in grids for _ in range(max(1, t // TEMPORAL_MERGE))]
        count = max(1, VIT_BATCH // max(map(math.prod, pairs)))
        batches = [pairs[i : i + count] for i in range(0, len(pairs), count)]
        sizes = [sum(map(math.prod, batch)) for batch in batches]
        return torch.cat([self.resampler_model(self.vision_model(x, batch), batch)
                          for x, batch in zip(patches.split(sizes), batches)])

    def new_cache(self) -> Cache:
        return Cache(len(self.layers))

    def marks(self, inputs: Inputs) -> list:
        """What two prompts are compared by, token by token: its id, or for a placeholder the whole picture's fingerprint."""
        marks, slots = inputs.ids.tolist(), is_placeholder(inputs.ids, self.cfg).nonzero().flatten()
        pictures = inputs.patches.cpu().split([*map(math.prod, inputs.grids)])
        for grid, picture, run in zip(inputs.grids, pictures, slots.split([math.prod(merged(g)) for g in inputs.grids])):
            marks[run[0] : run[-1] + 1] = [(grid, hashlib.sha1(picture.numpy()).digest())] * len(run)
        return marks

    def rest(self, inputs: Inputs, done: int) -> Inputs:
        """What is left of a prompt whose first `done` tokens a cache holds, and the pictures that stand in it."""
        left, grids = is_placeholder(inputs.ids[done:], self.cfg).sum(), list(inputs.grids)
        while sum(math.prod(merged(grid)) for grid in grids) > left:
            grids.pop(0)
        patches = inputs.patches[len(inputs.patches) - sum(map(math.prod, grids)) :]
        return Inputs(inputs.ids[done:], inputs.positions[:, done:], inputs.is_vision[done:], patches, grids)

    def prepare(self, ids: list[int], patches: Tensor | None = None, grids: list[tuple] = (),
                position_rule: str = "official") -> Inputs:
        """A prompt as tensors on the model's device. ids: T token ids. patches: (N, 588) normalised pixels. grids: one
        (t, h, w) for every picture and clip. Raises InputError when pictures and placeholders do not fit together."""
        ids, cfg, device = torch.as_tensor(ids, dtype=torch.long), self.cfg, self.embed_tokens.weight.device
        patches = torch.empty(0, 3 * PATCH**2) if patches is None else patches
        grids = [tuple(map(int, grid)) for grid in grids]
        check_prompt(ids, patches, grids, cfg, position_rule)
        where = positions(ids, grids, cfg, position_rule)
        return Inputs(ids.to(device), where.to(device), is_vision(ids, cfg).to(device), patches.to(device), grids)


def check_prompt(ids: Tensor, patches: Tensor, grids: list[tuple], cfg: Config, rule: str) -> None:
    text = cfg.text
    if rule not in ("official", "hf_5_23"):
        raise InputError(f'the position rule {rule!r} is unknown: "official" and "hf_5_23" are the two')
    if not len(ids):
        raise InputError("the prompt is empty: give it at least one token")
    if len(ids) > text.max_position_embeddings:
        raise InputError(f"the prompt has {len(ids):,} tokens and the context holds {text.max_position_embeddings:,}: "
                         "use fewer or smaller pictures, or a shorter text")
    if ids.min() < 0 or ids.max() >= text.vocab_size:
        raise InputError(f"token ids must lie in 0..{text.vocab_size - 1}, and these reach from {ids.min()} to {ids.max()}: "
                         "encode the prompt with this checkpoint's own tokenizer")
    if grids and not cfg.vision:
        raise InputError("this is a text-only checkpoint: ask it without a picture")
    for t, h, w in grids:
        if t < 1 or (t > 1 and t % TEMPORAL_MERGE) or h < 1 or w < 1 or h % SPATIAL_MERGE or w % SPATIAL_MERGE:
            raise InputError(f"a grid of (frames, rows, columns) = {(t, h, w)} cannot be merged: rows and columns must be "
                             "even, frames 1 or even (repeat the last one)")
    rows = sum(t * h * w for t, h, w in grids)
    if patches.shape != (rows, 3 * PATCH**2):
        raise InputError(f"grids {grids} need patches of shape {(rows, 3 * PATCH**2)}, and these are {tuple(patches.shape)}")
    tokens = [t * h * w for t, h, w in map(merged, grids)]
    slots = is_placeholder(ids, cfg).nonzero().flatten()
    if len(slots) != sum(tokens):
        raise InputError(f"the pictures make {sum(tokens)} tokens, and the prompt has {len(slots)} placeholders for them")
    for run in slots.split(tokens):
        if run[-1] - run[0] >= len(run):
            raise InputError(f"the {len(run)} placeholders of one picture must stand side by side")


# ------------------------------------------------------------------------------------------------- 7. sampling
def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token id from the logits (V,). Temperature 0 takes the likeliest. Otherwise a draw among the top_k likeliest
    (0: all), and of these among the fewest that hold the share top_p of their probability."""
    if temperature == 0:
        return int(logits.argmax())
    logits, order = logits.sort(descending=True)                                           # (V,), (V,)
    probs = ((logits - logits[0]).double() / temperature)[: top_k or None].softmax(-1)
    probs[probs.cumsum(-1) - probs >= top_p] = 0          # those that are likelier hold top_p already
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def penalize(logits: Tensor, seen: list[int], penalty: float) -> Tensor:                   # (V,) -> (V,)
    """Makes tokens that already stand in prompt or answer less likely (CTRL, arXiv:1909.05858)."""
    seen = torch.tensor(seen).unique()
    score = logits[seen]
    return logits.index_copy(0, seen, torch.where(score > 0, score / penalty, score * penalty))


@torch.inference_mode()
def generate(model: ErnieVL, inputs: Inputs, max_new_tokens: int = 1024, stop: tuple[int, ...] = (2,),
             temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
             seed: int | None = None, forbidden: tuple[int, ...] = (), cache: Cache | None = None) -> Iterator[int]:
    """Yields token ids one by one, until one of `stop` (not yielded) or the end of the context. The prompt runs once,
    with its pictures; then one token a step. `forbidden` ids are never chosen. The same seed gives the same ids. A `cache`
    from the turn before saves computing again what this prompt begins with."""
    generator = torch.Generator()       # on the CPU, like the logits below: a seed means the same on every device
    generator.manual_seed(generator.seed() if seed is None else seed)
    cache, seen, forbidden = cache or model.new_cache(), inputs.ids.tolist(), list(forbidden)
    step = inputs._replace(patches=inputs.patches[:0], grids=[], is_vision=torch.zeros_like(inputs.is_vision[:1]))
    marks = model.marks(inputs)
    done = cache.keep(marks)
    inputs, marks = model.rest(inputs, done), marks[done:]
    for _ in range(min(max_new_tokens, model.cfg.text.max_position_embeddings - len(seen))):
        logits = model(inputs, cache, only_last=True)[0].float().cpu()                     # (V,)
        cache.marks += marks
        logits[forbidden] = -torch.inf
        if repetition_penalty != 1:
            logits = penalize(logits, seen, repetition_penalty)
        token = sample(logits, temperature, top_k, top_p, generator)
        if token in stop:
            return
        yield token
        seen.append(token)      # whatever it says, it goes to the text experts, one step further on all three axes
        inputs = step._replace(ids=inputs.ids.new_tensor([token]), positions=inputs.positions[:, -1:] + 1)
        marks = [token]
