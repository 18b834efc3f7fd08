"""The stages of one pass: their names, their shapes, and which of our modules gives each. This is the one place that
says so: `make_reference.py` gives transformers' values these names, and `compare.py` asks for them.

    patches                        (N, P)        normalised pixels, in the order in which the ViT reads them
    vit.block.B                    (N, C)        output of ViT block B: of the first and of the last
    vit                            (N, C)        output of the ViT, behind its last LayerNorm
    resampler.spatial              (N/4, 4C)     output of spatial_linear, its LayerNorm included
    resampler.temporal             (tokens, 4C)  output of temporal_linear, its LayerNorm included
    resampler.mlp                  (tokens, D)
    resampler.after_norm           (tokens, D)   output of the resampler
    positions                      (3, T)        t, h, w
    is_vision                      (T,)          goes to the vision experts
    embedding                      (T, D)        token embeddings, with image features in the rows of placeholders
    layer.L.attention              (T, D)        output of o_proj, before it is added to the residual stream
    layer.L.router.probabilities   (T, E)        softmax over the experts of the token's own modality, without the bias
    layer.L.router.chosen          (T, K)        experts, counted from 0 in each modality, the highest p + bias first
    layer.L.router.weights         (T, K)        of the chosen experts, in the same order
    layer.L.output                 (T, D)        residual stream behind layer L
    norm                           (T, D)        behind the last RMSNorm
    logits                         (T, V)

The vision stages are left out where the prompt has no media, and the router's where the layer is dense.
"""
import torch
from torch import Tensor, nn

INPUTS = "patches", "positions", "is_vision"                     # stages that are computed before the model runs
ROUTER = "probabilities", "chosen", "weights"                    # what is seen of a router, in this order


def stage_names(model: nn.Module, has_media: bool = True) -> list[str]:
    """All stages, in the order in which they are computed."""
    return names_of(len(model.vision_model.blocks) if has_media else 0, model.cfg.text.mlp_layer_types)


def names_of(depth: int, layers: tuple[str, ...]) -> list[str]:
    """depth: number of ViT blocks, 0 for a prompt without media. layers: "dense" or "sparse", one for every layer."""
    blocks = [f"vit.block.{number}" for number in dict.fromkeys((0, depth - 1))]
    merges = [f"resampler.{part}" for part in ("spatial", "temporal", "mlp", "after_norm")]
    vision = ["patches", *blocks, "vit", *merges] if depth else []
    return [*vision, "positions", "is_vision", "embedding", *layer_names(layers), "norm", "logits"]


def layer_names(kinds: tuple[str, ...]) -> list[str]:
    return [f"layer.{number}.{stage}" for number, kind in enumerate(kinds)
            for stage in ("attention", *[f"router.{part}" for part in ROUTER] * (kind == "sparse"), "output")]


def stage_modules(model: nn.Module, has_media: bool = True) -> dict[str, str]:
    """Stage -> our module whose output it is. Embedding and final norm are what the next module is given, so that an
    edited copy of ours that lacks the norm still has the stage."""
    kinds, out = model.cfg.text.mlp_layer_types, {}
    if has_media:
        last = len(model.vision_model.blocks) - 1
        out = {f"vit.block.{number}": f"vision_model.blocks.{number}" for number in (0, last)}
        out |= {f"resampler.{part}": f"resampler_model.{part}_linear" for part in ("spatial", "temporal")}
        out |= {"vit": "vision_model", "resampler.mlp": "resampler_model.mlp"}
        out |= {"resampler.after_norm": "resampler_model"}
    for number in range(len(kinds)):
        out |= {f"layer.{number}.attention": f"layers.{number}.self_attn", f"layer.{number}.output": f"layers.{number}"}
    return out | {"logits": "lm_head"}


@torch.no_grad()
def our_stages(model: nn.Module, inputs) -> dict[str, Tensor]:
    """Runs the model once on `inputs`, with forward hooks; every stage by name, in the order of computing."""
    has_media, hooks, found = bool(inputs.grids), [], {stage: getattr(inputs, stage) for stage in INPUTS}
    keep = lambda stage: lambda module, given, out: found.__setitem__(stage, out.clone())
    keep_given = lambda stage: lambda module, given: found.__setitem__(stage, given[0].clone())
    for stage, path in stage_modules(model, has_media).items():
        hooks.append(model.get_submodule(path).register_forward_hook(keep(stage)))
    for stage, path in (("embedding", "layers.0"), ("norm", "lm_head")):
        hooks.append(model.get_submodule(path).register_forward_pre_hook(keep_given(stage)))
    routers = {number: watch_routers(layer.mlp, hooks) for number, layer in enumerate(model.layers) if layer.sparse}
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for number, calls in routers.items():
        merged = zip(ROUTER, by_token(calls, inputs.is_vision))
        found |= {f"layer.{number}.router.{part}": rows for part, rows in merged}
    return {stage: found[stage] for stage in stage_names(model, has_media) if stage in found}


def watch_routers(moe: nn.Module, hooks: list) -> list:
    """A list to which each call of a router of this layer appends (probabilities, chosen, weights)."""
    calls, of_call = [], {}
    for gate in (experts.gate for experts in (moe.text_moe, moe.vision_moe) if experts is not None):
        hooks.append(gate.softmax.register_forward_hook(lambda module, given, out: of_call.update(p=out.clone())))
        # in an edited copy that calls no softmax its weights stand for the probabilities, and are seen to be wrong
        hooks.append(gate.register_forward_hook(
            lambda module, given, out: calls.append((of_call.pop("p", out[0]), out[1], out[0]))))
    return calls


def by_token(calls: list[tuple], is_vision: Tensor) -> list[Tensor]:
    """What the routers of a layer said, one row a token. A call is that of the tokens of a modality whose number fits,
    or of all; tokens that no router saw have zeros."""
    masks, out = [~is_vision, is_vision, torch.ones_like(is_vision)], []
    for call in calls:
        mask = next((mask for mask in masks if mask.sum() == len(call[0])), None)
        if mask is not None:
            out = out or [rows.new_zeros(len(is_vision), rows.shape[1]) for rows in call]
            for whole, rows in zip(out, call):
                whole[mask] = rows
            masks = [other for other in masks if other is not mask] or masks
    return out
