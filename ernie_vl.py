"""ERNIE-4.5-VL in one file: a vision-language mixture of experts. Tensors in, tensors out.

    image, video ──> patches ──> VisionTransformer ──> Resampler ──┐
                                                                   ├──> tokens ──> DecoderLayers ──> logits ──> generate
    text ──> ids ──> embed_tokens ─────────────────────────────────┘      │
                                                    (t, h, w) positions ──┘

Start reading at `ErnieVL.forward`, near the end: it is the drawing above. Definitions stand in the order of the data;
modules are named as in the released checkpoints (the table in `load_weights.py` says where not).

Letters used in every shape comment (a test runs the model and checks the comments against the live tensors):

    T  tokens given to this pass    S  tokens so far, T included         V  vocabulary
    D  decoder width                H  query heads                       G  key/value heads     d  width of a head
    E  experts of one modality      K  experts chosen for a token        C  ViT width (inside it, H and d are its own)
    N  patches of all images        M  images and videos                 P  numbers in a patch (3 colours x 14 x 14)
    t, h, w  frames, rows and columns of one image or video: in patches in the ViT, in tokens in the decoder

There is no batch dimension: one conversation at a time. The model keeps no state: the KV cache is an argument.
The released checkpoints come through `load_weights.py`; text and images become tensors in `tokenizer.py`.
Technical report: https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf
"""
import json
from pathlib import Path
from typing import Callable, Generator, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14              # a patch is 14 x 14 pixels
SPATIAL_MERGE = 2       # the resampler joins 2 x 2 patches, so image sides are multiples of 28 pixels ...
TEMPORAL_MERGE = 2      # ... and then 2 consecutive frames, whose number whoever reads a video makes even
LAYER_NORM_EPS = 1e-6   # of LayerNorms; RMSNorms, of which the resampler's after_norm is one, take rms_norm_eps
VISION_ROPE_THETA = 10_000.0
PREFILL_CHUNK = 2048    # tokens of a prompt that `generate` gives the model at a time, to bound its memory


class InputError(ValueError):
    """Something that was given cannot be used. The message is one sentence that says what to do about it."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def read_json(path: Path, absent: dict | None = None) -> dict:
    """The object in a JSON file; `absent` when there is no such file, if that is given. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig")) if absent is None or path.is_file() else absent
    except FileNotFoundError:
        raise InputError(f"{path} is missing: is {path.parent} a checkpoint folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON that can be read ({error}): download it again") from None
    require(isinstance(value, dict), f"{path} holds no JSON object: download it again")
    return value


# ------------------------------------------------------------------------------------------ 1. configuration
# Field names are the keys of the released config.json files, where some lie deeper; load_weights.py reads both layouts.
# What has one value in every released model is a constant above, and the loader checks that the file agrees.
class VisionConfig(NamedTuple):
    depth: int                             # number of blocks (32 in the released models)
    hidden_size: int                       # C (1,280)
    intermediate_size: int                 # width inside the MLP of a block (5,120)
    num_heads: int                         # H of the ViT (16)


class TextConfig(NamedTuple):
    vocab_size: int                        # V
    hidden_size: int                       # D
    intermediate_size: int                 # width of the dense layers
    num_attention_heads: int               # H
    num_key_value_heads: int               # G
    head_dim: int                          # d
    max_position_embeddings: int           # longest context, in tokens
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]    # rotary pairs that follow h, w and t, in this order; together d/2
    tie_word_embeddings: bool              # the head is the embedding matrix
    mlp_layer_types: tuple[str, ...]       # "dense" or "sparse", one for every layer
    moe_num_experts: int                   # E
    moe_intermediate_size: tuple[int, ...] # inner width of (text, vision) experts; text-only models: (text,)
    moe_k: int                             # K
    moe_num_shared_experts: int            # one MLP, this many text experts wide, added without a weight; 0: none


class Config(NamedTuple):
    text: TextConfig
    vision: VisionConfig | None            # None for text-only models
    image_token_id: int                    # placeholder of one token of an image; all ids are -1 in text-only models
    video_token_id: int                    # the same for a video; the released prompts use image_token_id there too
    image_start_token_id: int
    image_end_token_id: int
    video_start_token_id: int
    video_end_token_id: int


# ---------------------------------------------------------------------------------------- 2. vision transformer
def widen(x: Tensor) -> Tensor:
    """In fp32, where the digits of bf16 would not do; in an fp64 model in fp64: then nothing is rounded in between."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inv_freq(pairs: int, theta: float, like: Tensor) -> Tensor:                        # -> (pairs,)
    """Rotary inverse frequencies, highest first. In fp32 and always on the CPU: in fp64, or by the power function of a
    GPU, they would differ from training in the last digit: 0.005 rad at position 100,000. Then widened, as `like`."""
    return (1.0 / theta ** (torch.arange(pairs, dtype=torch.float32, device="cpu") / pairs)).to(widen(like[:0]))


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:                      # (N, H, d) -> (N, H, d)
    """Rotary embedding of the ViT, in the "rotate_half" (NeoX) layout:              0 1 2 3 | 4 5 6 7
    rotates channel i with channel i + d/2.                                          └────────┘  one pair"""
    a, b = widen(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class VisionAttention(nn.Module):
    """Each patch attends to all patches of its own frame only. Frames are split, not masked: a mask would be N x N."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, frame_sizes: list[int]) -> Tensor:    # (N, C) -> (N, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)         # (N, H, d), (N, H, d), (N, H, d)
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)                      # (N, H, d), (N, H, d)
        q, k, v = (x.transpose(0, 1)[None].split(frame_sizes, dim=2) for x in (q, k, v))   # (1, H, h*w, d) a frame
        y = torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in zip(q, k, v)], dim=2)[0]    # (H, N, d)
        return self.proj(y.transpose(0, 1).flatten(1))                                     # y = softmax(q kᵀ / √d) v


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, frame_sizes: list[int]) -> Tensor:    # (N, C) -> (N, C)
        x = x + self.attn(self.norm1(x), cos, sin, frame_sizes)
        return x + self.mlp(self.norm2(x))


def patch_coordinates(h: int, w: int) -> Tensor:                                           # -> (h*w, 2)
    """(row, column) of every patch of a frame, in the order patches arrive: the four of a       0  1 |  4  5
    2 x 2 block side by side, so that the resampler can join them by a plain reshape.            2  3 |  6  7"""
    raster = torch.cartesian_prod(torch.arange(h), torch.arange(w))                        # (h*w, 2)
    blocks = raster.view(h // SPATIAL_MERGE, SPATIAL_MERGE, w // SPATIAL_MERGE, SPATIAL_MERGE, 2)
    return blocks.transpose(1, 2).reshape(h * w, 2)


class VisionTransformer(nn.Module):
    """Patches of all images and videos at once, with the same result as one call for each. No class token, no absolute
    positions: of a head's rotary pairs the first half rotates with the patch's row, the second with its column."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.head_dim = cfg.hidden_size // cfg.num_heads
        self.patch_embed = nn.Linear(3 * PATCH * PATCH, cfg.hidden_size, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth))
        self.ln = nn.LayerNorm(cfg.hidden_size, LAYER_NORM_EPS)

    def forward(self, patches: Tensor, grids: list[tuple]) -> Tensor:                      # (N, P) -> (N, C)
        frequency = inv_freq(self.head_dim // 4, VISION_ROPE_THETA, self.patch_embed.weight)   # of rows and of columns
        coordinates = torch.cat([patch_coordinates(h, w).repeat(t, 1) for t, h, w in grids])   # (N, 2)
        angles = (coordinates.to(patches.device)[:, None, :, None] * frequency).flatten(2) # (N, 1, d/2)
        cos, sin = angles.cos(), angles.sin()
        frame_sizes = [h * w for t, h, w in grids for _ in range(t)]
        x = self.patch_embed(patches.type_as(self.patch_embed.weight))                     # (N, C)
        for block in self.blocks:
            x = block(x, cos, sin, frame_sizes)
        return self.ln(x)


# ---------------------------------------------------------------------------- 3. variable-resolution resampler
def merge_mlp(n_in: int, n_out: int) -> nn.Sequential:
    gelu, norm = nn.GELU(), nn.LayerNorm(n_out, LAYER_NORM_EPS)         # GELU by erf: by tanh it moves logits by 1e-3
    return nn.Sequential(nn.Linear(n_in, n_out), gelu, nn.Linear(n_out, n_out), norm)


def token_grid(patch_grid: tuple) -> tuple[int, int, int]:
    """Grid of patches -> grid of tokens: (1, 34, 46) -> (1, 17, 23) of an image, (8, 4, 4) -> (4, 2, 2) of a video."""
    t, h, w = patch_grid
    return max(1, t // TEMPORAL_MERGE), h // SPATIAL_MERGE, w // SPATIAL_MERGE


class Resampler(nn.Module):
    """4 neighbouring patches -> 1, then 2 consecutive frames -> 1 (an image is paired with itself), then to width D.
    A larger image has more patches and makes more tokens; nothing is squeezed into a fixed number."""

    def __init__(self, cfg: VisionConfig, decoder_width: int, eps: float):
        super().__init__()
        self.merged_width = SPATIAL_MERGE**2 * cfg.hidden_size                             # 4C
        self.spatial_linear = merge_mlp(self.merged_width, self.merged_width)
        self.temporal_linear = merge_mlp(TEMPORAL_MERGE * self.merged_width, self.merged_width)
        self.mlp = nn.Linear(self.merged_width, decoder_width)
        self.after_norm = RMSNorm(decoder_width, eps)

    def forward(self, x: Tensor, grids: list[tuple]) -> Tensor:                            # (N, C) -> (tokens, D)
        x = self.spatial_linear(x.reshape(-1, self.merged_width))                          # (N/4, 4C)
        pairs, sizes = [], [t * h * w // SPATIAL_MERGE**2 for t, h, w in grids]
        for medium, (t, h, w) in zip(x.split(sizes), grids):
            frames = medium.view(t, -1, self.merged_width)                                 # (t, h*w/4, 4C)
            even, odd = (frames, frames) if t == 1 else (frames[0::2], frames[1::2])
            pairs.append(torch.cat((even, odd), dim=-1).flatten(0, 1))                     # (tokens, 8C), in order
        return self.after_norm(self.mlp(self.temporal_linear(torch.cat(pairs))))


# ------------------------------------------------------------------------- 4. positions on three axes, and rotary
def token_positions(ids: Tensor, grids: list[tuple], cfg: Config) -> Tensor:               # (T,) -> (3, T)
    """Time, row and column of every token. Text tokens (here the markers, too) have t = h = w; image tokens share t and
    vary in h and w; text continues after the largest number that was used:

             a  b  <start>  . . . . . .  <end>  c           . is a placeholder of an image of 2 x 3 tokens
        t    0  1     2     3 3 3 3 3 3    6    7
        h    0  1     2     3 3 3 4 4 4    6    7
        w    0  1     2     3 4 5 3 4 5    6    7

    In a video t counts pairs of frames, whatever the clock says. grids: in patches, as in `Inputs`."""
    token_grids = [token_grid(grid) for grid in grids]
    runs = is_placeholder(ids, cfg).nonzero().flatten().split([t * h * w for t, h, w in token_grids])
    positions = torch.arange(len(ids)).repeat(3, 1)                                        # (3, T)  as if all were text
    for run, (t, h, w) in zip(runs, token_grids):
        first, behind = int(run[0]), int(run[-1]) + 1
        inside = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T
        positions[:, first:behind] = positions[:, first : first + 1] + inside
        positions[:, behind:] += max(t, h, w) - len(run)
    return positions


def is_placeholder(ids: Tensor, cfg: Config) -> Tensor:                                    # (T,) -> (T,)
    return (ids == cfg.image_token_id) | (ids == cfg.video_token_id)


def vision_mask(ids: Tensor, cfg: Config) -> Tensor:                                       # (T,) -> (T,)
    """Which tokens of a prompt go to the vision experts: placeholders, and the start and end markers around them, since
    Baidu's processor labels the markers so in training. (Generated tokens never do: see `generate`.)"""
    markers = (cfg.image_start_token_id, cfg.image_end_token_id, cfg.video_start_token_id, cfg.video_end_token_id)
    return is_placeholder(ids, cfg) | torch.isin(ids, torch.tensor(markers))


def rotary(positions: Tensor, cfg: TextConfig, like: Tensor) -> tuple[Tensor, Tensor]:     # -> (T, 1, d/2), (T, 1, d/2)
    """cos and sin for all layers and heads. Which axis a rotary pair follows is data (0, 1, 2 = t, h, w): the fast ones
    alternate h w h w ..., the slow ones follow time. For text, where t = h = w, this is ordinary rotary embedding.
    Device and precision are those of `like`, widened."""
    pairs_h, _, pairs_t = cfg.mrope_section                  # as many pairs for w as for h, so they alternate
    axis = [1, 2] * pairs_h + [0] * pairs_t                  # 22 x (h, w), then 20 x t in the released models
    angles = positions[axis].T[:, None] * inv_freq(len(axis), cfg.rope_theta, like)        # (T, 1, d/2)
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:                           # (T, H, d) -> (T, H, d)
    """Rotary embedding of the decoder, in the interleaved (GPT-J) layout:             0 1 | 2 3 | 4 5 | 6 7
    rotates channel 2i with channel 2i + 1.                                            └─┘  one pair"""
    a, b = widen(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).type_as(x)


# ---------------------------------------------------------------------------------------------------- 5. decoder
class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:                                                # (T, D) -> (T, D)
        y = widen(x)                         # a mean of D squares loses digits in bf16
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class KVCache:
    """Keys (after rotary) and values of one layer: the first `length` rows of a buffer that grows by half when it is
    full. Written in place, so for inference only."""

    def __init__(self):
        self.length, self.buffer = 0, torch.empty(2, 1, 0, 1)      # no rows, of a shape that broadcasts to any

    def append(self, kv: Tensor) -> Tensor:                                            # (2, G, T, d) -> (2, G, S, d)
        past, length = self.length, self.length + kv.shape[2]
        if length > self.buffer.shape[2]:
            grown = kv.new_empty(*kv.shape[:2], length * 3 // 2 + 64, kv.shape[3])
            grown[:, :, :past] = self.buffer[:, :, :past]
            self.buffer = grown
        self.buffer[:, :, past:length] = kv
        self.length = length                 # last: after an interrupt, so many rows are whole
        return self.buffer[:, :, :length]


class Attention(nn.Module):
    """Grouped queries: H query heads share G keys and values. Causal, inside images too."""

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
        # The same result as below: one new token attends to every key, so the H/G heads of a group are the rows of one
        # product. Below, torch itself copies keys and values for every query head: most of a step at long contexts.
        return F.scaled_dot_product_attention(q.reshape(1, len(k), -1, q.shape[2]), k[None], v[None]).reshape(q.shape)
    # is_causal lets query 0 attend to key 0 alone; behind a cache query 0 stands S - T keys later
    mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    k, v = (x[:, None].expand(-1, len(q) // len(x), -1, -1) for x in (k, v))           # (G, H/G, S, d), which are views
    return F.scaled_dot_product_attention(q.view(*k.shape[:2], T, -1), k, v, mask, is_causal=T == S).flatten(0, 1)


class MLP(nn.Module):
    """SwiGLU. Used for dense layers, shared experts and routed experts alike."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:                                                # (T, D) -> (T, D)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses K experts per token: p = softmax(W x), the K largest p + bias are chosen, and weighed by p over the sum
    of these p. Aux-loss-free load balancing: training raises, without a gradient, the bias of those chosen too seldom.
    Weight and bias stay fp32 when the rest is bf16: rounding would choose other experts where scores are close."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.k, self.softmax = cfg.moe_k, nn.Softmax(-1)
        self.weight = nn.Parameter(torch.empty(cfg.moe_num_experts, cfg.hidden_size))      # the loader fills it
        self.e_score_correction_bias = nn.Parameter(torch.zeros(cfg.moe_num_experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:                                 # (T, D) -> (T, K), (T, K)
        p = self.softmax(F.linear(widen(x), widen(self.weight)))                           # (T, E)
        chosen = (p + self.e_score_correction_bias).topk(self.k).indices                 # (T, K)  the bias votes ...
        weights = p.gather(-1, chosen)                                                 # (T, K)  ... but has no weight
        return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)).type_as(x), chosen


class Experts(nn.Module):
    """The experts of one modality and their router, called with the tokens of this modality alone. A chosen expert runs
    once, on all tokens that chose it; the others are not touched, so memory-mapped weights stay on disk."""

    def __init__(self, cfg: TextConfig, intermediate_size: int):
        super().__init__()
        self.gate = Router(cfg)
        self.experts = nn.ModuleList(MLP(cfg.hidden_size, intermediate_size) for _ in range(cfg.moe_num_experts))

    def forward(self, x: Tensor) -> Tensor:                                                # (T, D) -> (T, D)
        weights, chosen = self.gate(x)
        if len(x) == 1:      # the same as below, but 3 to 6 % faster (a layer of the 28B): nothing is sorted by expert
            return sum(w * self.experts[e](x) for w, e in zip(weights[0], chosen[0].tolist()))
        y = torch.zeros_like(x)                                                            # (T, D)
        for e in chosen.unique().tolist():
            token_idx, slot = torch.where(chosen == e)
            y[token_idx] += weights[token_idx, slot, None] * self.experts[e](x[token_idx])
        return y


class ModalityMoE(nn.Module):
    """Text tokens go to text experts, vision tokens to (narrower) vision experts, all tokens to the shared experts."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        width, *vision_width = cfg.moe_intermediate_size
        shared = cfg.moe_num_shared_experts * width
        self.text_moe = Experts(cfg, width)
        self.vision_moe = Experts(cfg, *vision_width) if vision_width else None            # None in text-only models
        self.shared_experts = MLP(cfg.hidden_size, shared) if shared else None             # None in the 424B and 300B

    def forward(self, x: Tensor, is_vision: Tensor) -> Tensor:                             # (T, D), (T,) -> (T, D)
        y = torch.zeros_like(x)                                                            # (T, D)
        for experts, mask in ((self.text_moe, ~is_vision), (self.vision_moe, is_vision)):
            if mask.any():
                y[mask] = experts(x[mask])
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
    """Model inputs of one forward pass. `ErnieVL.prepare` makes them from a prompt."""
    ids: Tensor            # (T,)
    positions: Tensor      # (3, T): time, row, column
    is_vision: Tensor      # (T,) bool: goes to the vision experts
    patches: Tensor        # (N, P): images and videos in the order of the prompt
    grids: list[tuple]     # M times (t, h, w), counted in patches; t is 1 for an image and an even number for a video


class ErnieVL(nn.Module):
    """Tokens, with images among them -> logits. In bf16 some stays fp32: rotary, the mean of an RMSNorm, routers."""

    def __init__(self, cfg: Config):
        super().__init__()
        text, self.cfg = cfg.text, cfg
        self.vision_model = self.resampler_model = None                                    # as in text-only models
        if cfg.vision:
            self.vision_model = VisionTransformer(cfg.vision)
            self.resampler_model = Resampler(cfg.vision, text.hidden_size, text.rms_norm_eps)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(text, kind) for kind in text.mlp_layer_types)
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Where the config says so, the head takes the embedding's tensor; again after the embedding was replaced."""
        if self.cfg.text.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, inputs: Inputs, cache: list[KVCache] | None = None, only_last: bool = False) -> Tensor:
        """Logits of every token, (T, V), or of the last one alone, (1, V). A cache, one KVCache a layer, is extended in
        place; `inputs` are then the tokens that follow what it holds, with positions that go on counting."""
        x = self.embed(inputs)                                                             # (T, D)
        cos, sin = rotary(inputs.positions, self.cfg.text, x)                              # (T, 1, d/2), (T, 1, d/2)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, inputs.is_vision, cache and cache[i])                   # (T, D)
        return self.lm_head(self.norm(x[-1:] if only_last else x))                         # (T, V), or (1, V)

    def embed(self, inputs: Inputs) -> Tensor:                                             # -> (T, D)
        """Embeddings of the tokens, with placeholder rows replaced by image features."""
        x = self.embed_tokens(inputs.ids)                                                  # (T, D)
        if inputs.grids:
            y = self.vision_model(inputs.patches, inputs.grids)                            # (N, C)
            y = self.resampler_model(y, inputs.grids)                                      # (tokens, D)
            x[is_placeholder(inputs.ids, self.cfg)] = y.type_as(x)
        return x

    def prepare(self, ids: list[int], patches: Tensor | None = None, grids: list[tuple] = ()) -> Inputs:
        """A prompt as tensors on the model's device. ids: T token ids. patches: (N, P) normalised pixels. grids: one
        (t, h, w) for every image and video. Raises InputError when images and placeholders do not fit together."""
        ids, cfg, device = torch.as_tensor(ids, dtype=torch.long), self.cfg, self.embed_tokens.weight.device
        patches = torch.empty(0, 3 * PATCH**2) if patches is None else patches
        grids = [tuple(map(int, grid)) for grid in grids]
        check_prompt(ids, patches, grids, cfg)
        positions, is_vision = token_positions(ids, grids, cfg).to(device), vision_mask(ids, cfg).to(device)
        return Inputs(ids.to(device), positions, is_vision, patches.to(device), grids)


def check_prompt(ids: Tensor, patches: Tensor, grids: list[tuple], cfg: Config) -> None:
    context, vocab_size = cfg.text.max_position_embeddings, cfg.text.vocab_size
    require(0 < len(ids) <= context, f"the prompt has {len(ids):,} tokens, and must have 1 to {context:,}: "
                                     "use fewer or smaller images, or a shorter text")
    require(0 <= ids.min() and ids.max() < vocab_size, f"token ids must lie in 0..{vocab_size - 1}, not reach from "
                                                       f"{ids.min()} to {ids.max()}: use the checkpoint's tokenizer")
    require(not grids or cfg.vision is not None, "this is a text-only checkpoint: ask it without an image")
    for t, h, w in grids:
        fits = min(t, h, w) > 0 and h % SPATIAL_MERGE == w % SPATIAL_MERGE == 0 and (t == 1 or t % TEMPORAL_MERGE == 0)
        require(fits, f"the grid {(t, h, w)} cannot be merged: it needs even rows and columns, and frames 1 or even")
    shape = (sum(t * h * w for t, h, w in grids), 3 * PATCH**2)
    require(patches.shape == shape, f"{grids=} need patches of shape {shape}, and these are {tuple(patches.shape)}")
    placeholder_idx = is_placeholder(ids, cfg).nonzero().flatten()
    tokens = [t * h * w for t, h, w in map(token_grid, grids)]
    require(len(placeholder_idx) == sum(tokens),
            f"the images make {sum(tokens)} tokens, and the prompt has {len(placeholder_idx)} placeholders for them")
    for run in placeholder_idx.split(tokens):
        require(run[-1] - run[0] < len(run), f"the {len(run)} placeholders of one image must stand side by side")


# ------------------------------------------------------------------------------------------------ 7. generating
def pieces(inputs: Inputs, cfg: Config, limit: int = PREFILL_CHUNK) -> Iterator[Inputs]:
    """Chunked prefill: the same prompt as several Inputs of about `limit` tokens, to be run one after the other with
    one cache. No cut is inside a unit (an image, or a pair of frames); a larger unit is its own piece. That is exact,
    since the ViT attends within a frame, and the resampler joins pairs of frames."""
    grids = [(min(t, TEMPORAL_MERGE), h, w) for t, h, w in inputs.grids for _ in range(0, t, TEMPORAL_MERGE)]
    runs = is_placeholder(inputs.ids, cfg).nonzero().flatten().split([h * w // SPATIAL_MERGE**2 for _, h, w in grids])
    units = [(int(run[0]), int(run[-1]) + 1, grid) for run, grid in zip(runs, grids)]
    begin, patches = 0, inputs.patches
    while begin < len(inputs.ids):
        end = min(begin + limit, len(inputs.ids))
        for first, behind, _ in units:
            if first < end < behind:         # the cut would be inside: before the unit, or behind one that comes first
                end = first if first > begin else behind
        here, part = slice(begin, end), [grid for first, _, grid in units if begin <= first < end]
        count = sum(t * h * w for t, h, w in part)
        yield Inputs(inputs.ids[here], inputs.positions[:, here], inputs.is_vision[here], patches[:count], part)
        begin, patches = end, patches[count:]


def greedy(logits: Tensor) -> int:                                                         # (V,) -> an id
    return int(logits.argmax())


def sampler(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
            seed: int | None = None, seen: list[int] = (), suppressed: list[int] = ()) -> Callable[[Tensor], int]:
    """A `choose` for one answer: draws among the top_k likeliest ids (0: all), and of these among the smallest set with
    cumulative probability top_p (nucleus); temperature 0 is greedy. A seed draws the same ids from the same logits.
    repetition_penalty makes ids rarer that were chosen or are in `seen`, the prompt's. `suppressed` never come."""
    generator, seen, suppressed = torch.Generator(), list(seen), torch.tensor(suppressed, dtype=torch.long)
    generator.manual_seed(generator.seed() if seed is None else seed)

    def choose(logits: Tensor) -> int:                                                     # (V,) -> an id
        logits = logits.index_fill(0, suppressed, -torch.inf)
        if repetition_penalty != 1:      # as in CTRL, arXiv:1909.05858
            score = logits[ids := torch.tensor(seen, dtype=torch.long).unique()]
            logits[ids] = torch.where(score > 0, score / repetition_penalty, score * repetition_penalty)
        seen.append(sample(logits, temperature, top_k, top_p, generator) if temperature > 0 else greedy(logits))
        return seen[-1]
    return choose


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    logits, order = logits.sort(descending=True)                                           # (V,), (V,)
    probs = ((logits - logits[0]).double() / temperature)[: top_k or None].softmax(-1)
    probs[probs.cumsum(-1) - probs >= max(top_p, 1e-9)] = 0      # those that are likelier hold top_p already
    return int(order[torch.multinomial(probs, 1, generator=generator)])


@torch.inference_mode()
def generate(model: ErnieVL, inputs: Inputs, choose: Callable[[Tensor], int] = greedy, stop: tuple[int, ...] = (2,),
             max_new_tokens: int = 1024, cache: list[KVCache] | None = None) -> Generator[int, None, str]:
    """Yields token ids, and returns why it ended: "stop" (one of `stop` came; 2 is </s>), "length" or "context".
    inputs: the prompt, or what of it follows the tokens in `cache`; it runs once, then one token a step, and the last
    token stays out of the cache. choose: logits (V,), in fp32 on the CPU, -> an id."""
    cache = [KVCache() for _ in model.layers] if cache is None else cache
    room = model.cfg.text.max_position_embeddings - cache[0].length - len(inputs.ids)
    parts, position = pieces(inputs, model.cfg), inputs.positions[:, -1:].amax(0).expand(3, 1)
    for _ in range(min(max_new_tokens, room)):
        for part in parts:
            logits = model(part, cache, only_last=True)                                    # (1, V)
        token = choose(logits[0].float().cpu())
        if token in stop:
            return "stop"
        yield token
        position = position + 1      # on all axes; and what is generated is always text
        ids, is_vision = inputs.ids.new_tensor([token]), torch.zeros_like(inputs.is_vision[:1])
        parts = [Inputs(ids, position, is_vision, inputs.patches[:0], [])]
    return "length" if max_new_tokens <= room else "context"
