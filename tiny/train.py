"""Trains the bundled checkpoint, with ernie_vl.py as it is, on the pictures of scenes.py.

    python tiny/train.py              from nothing; --resume goes on after an interruption
    python tiny/train.py --evaluate   how much the checkpoint in this folder gets right on fresh pictures

Writes the checkpoint in the folder it stands in, with config.json in the nested layout and tensors under the hub's names, and
training.pt, from which --resume goes on.
"""
import argparse
import io
import json
import math
import random
import sys
import time
from functools import partial
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from ernie_vl import ErnieVL, Experts, Inputs, generate                            # noqa: E402
from load_weights import candidates, load, read_config, router                     # noqa: E402
from scenes import COLOURS, PLACES, RELATIONS, SHAPES, SKILLS                      # noqa: E402
from tokenizer import Tokenizer, encode_chat                                       # noqa: E402

FRESH = 1_000_000            # seeds of pictures that are never trained on start here
PIXELS = 12_544, 25_088        # smallest and largest picture: 16 to 32 tokens
PACK = 6                     # conversations behind one another in one sequence, which makes one optimizer step
# so that questions in other words have longer pieces than bytes
ENGLISH = "who what when which how many are there in the picture and can you tell me please it has one two three four no yes not"
CONTROL = ["<|end_of_sentence|>", "<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>",
           "<|VIDEO_START|>", "<|VIDEO_END|>", "<|VIDEO_PLACEHOLDER|>", "<think>", "</think>"]


# ----------------------------------------------------------------------------------------- vocabulary and config
def make_vocabulary() -> None:
    """SentencePiece BPE laid out as the real one: 3 specials, 10 digits, 256 bytes, then pieces; control tokens behind."""
    words = [*COLOURS, *SHAPES, *PLACES, *sum(RELATIONS.values(), ())]
    corpus = [f"{a} {word} {b}" for word in words for a in ("a", "A", "It is", "Where is the") for b in ("circle.", "picture?")]
    corpus += [SKILLS[name](random.Random(seed)).question for name in SKILLS for seed in range(100)]
    corpus += ["User: Describe this image. Picture 1:", "Assistant: ", ENGLISH] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=512, byte_fallback=True,
        character_coverage=1.0, user_defined_symbols=list("0123456789"), normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
    (HERE / "tokenizer.model").write_bytes(model.getvalue())
    first = len(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
    write_json("added_tokens.json", {name: first + i for i, name in enumerate(CONTROL)})


def make_config(vocabulary: dict[str, int]) -> None:
    write_json("config.json", {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "model_type": "ernie4_5_vl_moe",
        "image_token_id": vocabulary["<|IMAGE_PLACEHOLDER|>"], "video_token_id": vocabulary["<|VIDEO_PLACEHOLDER|>"],
        "image_start_token_id": vocabulary["<|IMAGE_START|>"], "image_end_token_id": vocabulary["<|IMAGE_END|>"],
        "video_start_token_id": vocabulary["<|VIDEO_START|>"], "video_end_token_id": vocabulary["<|VIDEO_END|>"],
        "tie_word_embeddings": True, "dtype": "float32",
        "text_config": {
            "model_type": "ernie4_5_vl_moe_text", "vocab_size": 1 + max(vocabulary.values()), "hidden_size": 96,
            "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "use_bias": False,
            "tie_word_embeddings": True, "mlp_layer_types": ["dense", "sparse", "sparse"], "moe_num_experts": 8, "moe_k": 2,
            "moe_intermediate_size": [48, 32], "moe_num_shared_experts": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [6, 6, 4]}},
        "vision_config": {
            "model_type": "ernie4_5_vl_moe_vision", "depth": 2, "hidden_size": 48, "num_heads": 4, "intermediate_size": 192,
            "hidden_act": "quick_gelu", "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_merge_size": 2,
            "rms_norm_eps": 1e-6}})
    write_json("generation_config.json", {"eos_token_id": 2})
    write_json("preprocessor_config.json", {"image_processor_type": "Ernie4_5_VLMoeImageProcessor",
                                            "size": {"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}})


def write_json(name: str, value: dict) -> None:
    (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


def save(model: ErnieVL, file: Path) -> None:
    """Under the names of the released files, which the loader's table knows: routers transposed, both biases in one tensor."""
    tensors = {}
    for ours, value in model.state_dict().items():
        theirs, take, _ = next(candidates(ours, model.cfg.text.moe_num_experts))
        theirs = theirs if theirs.startswith("vision_model.") else f"model.{theirs}"
        if "correction_bias" in ours:
            value = torch.stack([*tensors.get(theirs, []), value])
        tensors[theirs] = value.T.contiguous() if take is router else value.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


# -------------------------------------------------------------------------------------------------------- training
def conversation(tokenizer: Tokenizer, seed: int) -> tuple:
    """One example as (prompt, answer ids, what was asked); the answer ends with </s>, as the released models end theirs."""
    rng = random.Random(seed)
    skill = rng.choice(list(SKILLS))
    example = SKILLS[skill](rng)
    parts = [{"type": "text", "text": example.question}, {"type": "image", "image": example.picture}]
    prompt = encode_chat(tokenizer, [{"role": "user", "content": parts}], think=False)
    return prompt, tokenizer.encode(example.answer) + [2], skill


def pack(model: ErnieVL, tokenizer: Tokenizer, seeds: range) -> tuple[Inputs, torch.Tensor]:
    """Conversations behind one another in one sequence, and the id that should follow each token (-100: not asked)."""
    ids, targets, patches, grids = [], [], [], []
    for prompt, answer, _ in (conversation(tokenizer, seed) for seed in seeds):
        ids += prompt.ids + answer[:-1]
        targets += [-100] * (len(prompt.ids) - 1) + answer
        patches.append(prompt.patches)
        grids += prompt.grids
    return model.prepare(ids, torch.cat(patches), grids), torch.tensor(targets)


class BiasUpdate:
    """The aux-free balance of the family: after a step, a router's bias goes up for experts that were chosen less often
    than the average and down for the others. The bias has no gradient."""

    def __init__(self, model: ErnieVL, rate: float = 1e-3):
        self.rate, self.gates = rate, [m.gate for m in model.modules() if isinstance(m, Experts)]
        self.counts = [torch.zeros_like(gate.e_score_correction_bias) for gate in self.gates]
        for gate, count in zip(self.gates, self.counts):
            gate.register_forward_hook(partial(self.count, count))

    @staticmethod
    def count(count: torch.Tensor, gate, x, out) -> None:
        count += out[1].flatten().bincount(minlength=len(count))

    def step(self) -> None:
        for gate, count in zip(self.gates, self.counts):
            gate.e_score_correction_bias += self.rate * (count.mean() - count).sign()
            count.zero_()


def new_model(cfg) -> ErnieVL:
    torch.manual_seed(0)
    model = ErnieVL(cfg)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter.shape[1]))
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.05)
    return model


def train(steps: int, resume: bool, rate: float) -> None:
    if not resume:
        make_vocabulary()
        make_config(json.loads((HERE / "added_tokens.json").read_text()))
    tokenizer = Tokenizer(HERE)
    model = new_model(read_config(json.loads((HERE / "config.json").read_text())))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.02)
    balance, state, recent = BiasUpdate(model), {"step": 0, "seconds": 0.0}, []
    if resume:
        state = torch.load(HERE / "training.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = time.time() - state["seconds"]
    for step in range(state["step"], steps):
        for group in optimizer.param_groups:      # a short warm-up, then half a cosine
            group["lr"] = rate * min(1, (step + 1) / 100, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        inputs, targets = pack(model, tokenizer, range(step * PACK, (step + 1) * PACK))
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        balance.step()
        recent = [*recent[-99:], loss.item()]
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:6d} of {steps}   loss {sum(recent) / len(recent):.4f}   {time.time() - start:6.0f} s", flush=True)
        if (step + 1) % 2000 == 0 or step + 1 == steps:
            state = {"step": step + 1, "seconds": time.time() - start, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, HERE / "training.pt")
            save(model, HERE / "model.safetensors")
            print(evaluate(50), flush=True)


def evaluate(count: int) -> str:
    """The share of answers that are right to the letter, by skill, on fresh pictures."""
    model, tokenizer, right = load(HERE), Tokenizer(HERE), {name: [] for name in SKILLS}
    seed = FRESH
    while min(map(len, right.values())) < count:
        prompt, answer, skill = conversation(tokenizer, seed)
        right[skill].append([*generate(model, model.prepare(*prompt), 40, stop=(2,))] == answer[:-1])
        seed += 1
    return "   ".join(f"{name} {sum(hits[:count])} of {count}" for name, hits in right.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=7e-4, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from training.pt")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, count right answers on 100 fresh pictures a skill")
    args = parser.parse_args()
    torch.set_num_threads(1)      # so small a model is faster on one
    if args.resume and not (HERE / "training.pt").is_file():
        sys.exit("error: there is no training.pt to resume from: start without --resume")
    try:
        print(evaluate(100)) if args.evaluate else train(args.steps, args.resume, args.rate)
    except KeyboardInterrupt:
        sys.exit("stopped: --resume goes on from the last 2,000 steps that were completed")
