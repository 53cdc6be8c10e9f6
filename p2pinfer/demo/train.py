"""Train the demo model from nothing: corpus, tokenizer, Llama, Hugging Face files.

Run ``python -m p2pinfer.demo.train --steps 2600 --out DIR``. The same arguments give the same
model on the same machine; the model is small enough for one thread of an ordinary processor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional

from p2pinfer.demo import MODEL_DIR
from p2pinfer.demo.primer import prime
from p2pinfer.demo.stories import stories

BEGIN = "<|begin_of_text|>"
END = "<|end_of_text|>"
# The split of Llama 3, so that a word and the space before it become one token.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_STORIES = 8000
ROW_LENGTHS = (320, 640, 1024, 2048)
ROW_WEIGHTS = (14, 4, 1, 1)
PRIMER_LENGTH = 96


@dataclass(frozen=True)
class Shape:
    """The architecture, by the names of a Hugging Face configuration."""

    hidden_size: int = 224
    num_hidden_layers: int = 4
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 16
    intermediate_size: int = 1024
    vocab_size: int = 1536
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        """Start with a scale of one."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension in float32."""
        return functional.rms_norm(hidden.float(), (hidden.shape[-1],), self.weight, self.eps)


def rotary_table(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of every position, each of shape [positions, head_dim]."""
    exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    angles = torch.outer(torch.arange(shape.max_position_embeddings).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings in the half-split convention of Hugging Face."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, shape: Shape) -> None:
        """Create the four projections."""
        super().__init__()
        self.shape = shape
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attend from every position to itself and to the positions before it."""
        batch, length, _ = hidden.shape

        def split(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(batch, length, -1, self.shape.head_dim).transpose(1, 2)

        # Attention stays in float32 because that is the faster kernel for heads this narrow.
        query = rotate(split(self.q_proj(hidden)), cos, sin)
        key = rotate(split(self.k_proj(hidden)), cos, sin)
        value = split(self.v_proj(hidden))
        mixed = functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True
        )
        output: torch.Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class FeedForward(nn.Module):
    """The SwiGLU feed-forward network."""

    def __init__(self, shape: Shape) -> None:
        """Create the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gate, widen and narrow again."""
        output: torch.Tensor = self.down_proj(
            functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        )
        return output


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each with its norm and residual."""

    def __init__(self, shape: Shape) -> None:
        """Create the parts under the names that Hugging Face gives them."""
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Run the layer on hidden states of shape [batch, length, hidden_size]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        output: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Llama(nn.Module):
    """A Llama for training: no cache, and the loss computed over all positions."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        """Create the weights, normally distributed."""
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        cos, sin = rotary_table(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The usual 0.02 belongs to wider models; at this width it would make the first
                # activations very small.
                scale = shape.hidden_size**-0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    # These add up in the residual stream; its variance must not grow with depth.
                    scale = (2 * shape.num_hidden_layers * parameter.shape[1]) ** -0.5
                nn.init.normal_(parameter, std=scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of predicting each token of [batch, length + 1] from the earlier."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        length = inputs.shape[1]
        hidden = self.embed_tokens(inputs)
        for layer in self.layers:
            hidden = layer(hidden, self.cos[:length], self.sin[:length])
        logits = functional.linear(self.norm(hidden), self.embed_tokens.weight)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the number of a token that the vocabulary is known to hold."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return int(number)


def train_tokenizer(shape: Shape, seed: int) -> Tokenizer:
    """Train a byte-level BPE on stories; any UTF-8 text survives the way there and back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    source = stories(seed)
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((next(source) for _ in range(TOKENIZER_STORIES)), trainer)
    begin = token_id(tokenizer, BEGIN)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
            ),
        ]
    )
    return tokenizer


def texts(seed: int, primer_share: Callable[[], float]) -> Iterator[str]:
    """Yield a fresh text every time: a primer text with the wanted probability, else a story."""
    rng = random.Random(seed)
    source = stories(seed + TOKENIZER_STORIES)
    while True:
        number = rng.getrandbits(32)
        yield prime(number) if rng.random() < primer_share() else next(source)


def batches(tokenizer: Tokenizer, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield batches of rows, each filled with fresh texts from a beginning on.

    Most rows are short, because one story is; the longer ones teach the late positions.
    """
    rng = random.Random(args.seed)
    share = 1.0
    source = texts(args.seed, lambda: share)
    end = token_id(tokenizer, END)
    for step in itertools.count():
        # The second stretch mixes both kinds, so that what was learned carries over to stories.
        share = 1.0 if step < args.primer_steps else 0.3 if step < 2 * args.primer_steps else 0.0
        length = rng.choices(ROW_LENGTHS, ROW_WEIGHTS)[0] if share < 1.0 else PRIMER_LENGTH
        rows = []
        for _ in range(max(1, args.tokens_per_step // length)):
            row: list[int] = []
            while len(row) <= length:
                row.extend([*tokenizer.encode(next(source)).ids, end])
            rows.append(row[: length + 1])
        yield torch.tensor(rows)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rise linearly at first, then follow a cosine down to a twentieth of the peak."""
    warmup = min(100, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Llama, tokenizer: Tokenizer, args: argparse.Namespace) -> float:
    """Train in place and return the mean loss of the last steps."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    recent: list[float] = []
    start = time.monotonic()
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=args.steps)
        source = batches(tokenizer, args)
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.learning_rate)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
                loss: torch.Tensor = model(next(source))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent = [*recent[-49:], loss.item()]
            mean = sum(recent) / len(recent)
            progress.update(task, advance=1, description=f"loss {mean:.4f}")
            if (step + 1) % 50 == 0:
                progress.console.print(
                    f"step {step + 1} loss {mean:.4f} seconds {time.monotonic() - start:.0f}"
                )
            if args.save_every and (step + 1) % args.save_every == 0:
                save(model, tokenizer, args.out)
    return sum(recent) / max(1, len(recent))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration file as people like to read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save(model: Llama, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model as a Hugging Face folder, the tensors rounded to float16."""
    out.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    begin, end = token_id(tokenizer, BEGIN), token_id(tokenizer, END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **vars(shape),
        "hidden_act": "silu",
        "initializer_range": shape.hidden_size**-0.5,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": begin,
        "eos_token_id": end,
        "dtype": "float32",
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": begin, "eos_token_id": end})
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)
    tensors = {
        f"model.{name}": tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # The file is written readable by its owner alone, and would be installed like that.
    (out / "model.safetensors").chmod(0o644)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m p2pinfer.demo.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=2600, help="optimiser steps")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and stories")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--primer-steps", type=int, default=350, help="first steps on short texts")
    parser.add_argument("--tokens-per-step", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--bfloat16", action="store_true", help="multiply matrices in bfloat16")
    parser.add_argument("--save-every", type=int, default=0, help="also save every N steps")
    return parser.parse_args(arguments)


def main() -> None:
    """Train the tokenizer and the model and write both."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shape = Shape()
    tokenizer = train_tokenizer(shape, args.seed)
    model = Llama(shape)
    loss = train(model, tokenizer, args)
    save(model, tokenizer, args.out)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"final loss {loss:.4f}; {size} bytes in {args.out}")


if __name__ == "__main__":
    main()
