"""Every tuner of Hugging Face peft that deltune reads, with its options, on every architecture where it can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from tests.zoo import ARCHITECTURES, Architecture, Head

__all__ = ["CASES", "LENGTH", "Case", "logits", "randomized", "same"]

#: Rows of prompts and prefixes.
LENGTH = 3

#: Modules by architecture: attention, all linear maps of the layers, the inputs that (IA)^3 scales, embeddings.
MODULES: dict[str, dict[str, list[str]]] = {
    "bert": {
        "attention": ["query", "value"],
        "all": ["query", "key", "value", "dense"],
        "ia3": ["key", "value", "layer.0.output.dense", "layer.1.output.dense", "layer.2.output.dense"],
        "inputs": ["layer.0.output.dense", "layer.1.output.dense", "layer.2.output.dense"],
        "embeddings": ["word_embeddings"],
    },
    "gpt2": {
        "attention": ["c_attn"],
        "all": ["c_attn", "c_proj", "c_fc"],
        "ia3": ["c_attn", "mlp.c_proj"],
        "inputs": ["mlp.c_proj"],
        "embeddings": ["wte"],
    },
    "llama-gqa": {
        "attention": ["q_proj", "v_proj"],
        "all": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
        "ia3": ["k_proj", "v_proj", "down_proj"],
        "inputs": ["down_proj"],
        "embeddings": ["embed_tokens"],
    },
    "t5": {
        "attention": ["q", "v"],
        "all": ["q", "k", "v", "o", "wi", "wo"],
        "ia3": ["k", "v", "wo"],
        "inputs": ["wo"],
        "embeddings": ["shared"],
    },
    "vit": {
        "attention": ["q_proj", "v_proj"],
        "all": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        "ia3": ["k_proj", "v_proj", "fc2"],
        "inputs": ["fc2"],
        "embeddings": [],
    },
}
TASKS: dict[str, dict[Head, str | None]] = {
    "bert": {"classification": "SEQ_CLS", "tokens": "TOKEN_CLS"},
    "gpt2": {"classification": "SEQ_CLS", "language": "CAUSAL_LM"},
    "llama-gqa": {"classification": "SEQ_CLS", "language": "CAUSAL_LM"},
    "t5": {"language": "SEQ_2_SEQ_LM"},
    "vit": {"classification": None},
}


@dataclass(frozen=True)
class Case:
    """A tuner with its options on an architecture."""

    name: str
    architecture: Architecture
    head: Head
    config: Callable[[Mapping[str, list[str]], str | None], Any]
    notes: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """The model, always with the same weights."""
        return self.architecture.build(self.head, **self.changes)

    def peft_model(self) -> Any:
        """The model in peft, with random values for all that trains."""
        task = TASKS[self.architecture.name][self.head]
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = self.config(MODULES[self.architecture.name], task)
            return randomized(peft.get_peft_model(self.build(), config)).eval()

    def batches(self) -> list[dict[str, Tensor]]:
        """Inputs without padding and, where there is padding, with some on the right."""
        paddings = ("none", "right") if self.architecture.pads else ("none",)
        return [
            {
                key: value
                for key, value in self.architecture.batch(3, 7, padding=padding, head=self.head).items()
                if key != "position_ids"
            }
            for padding in paddings
        ]

    def reloaded(self, folder: Path) -> Any:
        """What peft itself reads from a folder, into a fresh model."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|lora_bias=True).*")
            return peft.PeftModel.from_pretrained(self.build(), str(folder)).eval()


def randomized(model: Any, seed: int = 5) -> Any:
    """Give everything that trains random values, none of them zero or where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                around_one = any(part in name for part in ("ia3_l", "magnitude", "LayerNorm.weight", "ln_"))
                parameter.add_(0.2 * noise) if around_one else parameter.copy_(0.2 * noise + 0.1)
    return model


def logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The main output at the text's own positions, those of padding left out."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(**batch)
    value: Tensor = output.logits
    if value.dim() == 3 and "decoder_input_ids" not in batch:
        value = value[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]
    return value


def same(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest value if that is above one."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))


Builder = Callable[[Mapping[str, list[str]], str | None], Any]


def lora(which: str = "attention", **options: Any) -> Builder:
    return lambda modules, task: peft.LoraConfig(
        task_type=task, target_modules=options.get("target_modules", modules[which]), **_given(options)
    )


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 5} | {key: value for key, value in options.items() if key != "target_modules"}


def adalora(pruned: bool = False) -> Builder:
    def build(modules: Mapping[str, list[str]], task: str | None) -> Any:
        config = peft.AdaLoraConfig(
            task_type=task, target_modules=modules["attention"], init_r=4, target_r=2, lora_alpha=5, total_step=10
        )
        config._pruned = pruned
        return config

    return build


def ia3(modules: Mapping[str, list[str]], task: str | None) -> Any:
    return peft.IA3Config(task_type=task, target_modules=modules["ia3"], feedforward_modules=modules["inputs"])


def lokr(which: str = "all", **options: Any) -> Builder:
    return lambda modules, task: peft.LoKrConfig(
        task_type=task, target_modules=modules[which], **({"r": 2, "alpha": 3} | options)
    )


def prefix(modules: Mapping[str, list[str]], task: str | None) -> Any:
    return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH)


def projected(modules: Mapping[str, list[str]], task: str | None) -> Any:
    return peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=6
    )


def prompt(modules: Mapping[str, list[str]], task: str | None) -> Any:
    return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH)


def p_tuning(kind: str) -> Builder:
    return lambda modules, task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=LENGTH, encoder_hidden_size=6, encoder_reparameterization_type=kind
    )


EVERY = ("bert", "gpt2", "llama-gqa", "t5", "vit")
FOLDED = ("went into their B",)
CUT = ("multiplied out",)
NORMS = ["ln_f", "norm", "final_layer_norm", "token_type_embeddings"]
#: name, builder, architectures, expected notes
TUNERS: tuple[tuple[str, Builder, tuple[str, ...], tuple[str, ...]], ...] = (
    ("lora", lora(), EVERY, ()),
    ("lora-all-linear", lora(target_modules="all-linear"), EVERY, ()),
    ("lora-regex", lora(target_modules=r".*\.(0|block\.1)\..*(query|c_attn|q_proj|q)"), EVERY, ()),
    ("lora-excluded", lora("all", exclude_modules=["1.attn.c_attn", "value", "v_proj", "v"]), EVERY, ()),
    ("lora-layers", lora("all", layers_to_transform=[0, 2]), ("bert", "gpt2", "llama-gqa"), ()),
    ("lora-layers-pattern", lora("attention", layers_to_transform=1, layers_pattern="layers"), ("llama-gqa",), ()),
    ("lora-ranks", lora("all", rank_pattern={r"\w*\.?0\..*": 2, "value": 5}), ("bert", "gpt2", "llama-gqa"), ()),
    ("lora-alphas", lora("all", alpha_pattern={"value": 7, "v_proj": 7, "c_fc": 20}), EVERY[:3], FOLDED),
    ("rslora", lora(use_rslora=True, rank_pattern={"value": 2, "v_proj": 2}), EVERY, ()),
    ("dora", lora("all", use_dora=True), EVERY, ()),
    ("lora-mica", lora(init_lora_weights="mica"), ("bert", "gpt2"), ()),
    ("lora-orthogonal", lora(init_lora_weights="orthogonal", r=4), ("bert",), ()),
    ("lora-large-rank", lora(r=40), ("bert", "llama-gqa"), CUT),
    ("lora-embeddings", lora("embeddings"), ("bert", "gpt2", "llama-gqa"), ()),
    ("lora-convolution", lora(target_modules=["projection", "q_proj"]), ("vit",), ()),
    ("lora-bias", lora(lora_bias=True), EVERY, ()),
    ("lora-biases-all", lora(bias="all"), ("bert", "gpt2", "t5", "vit"), ()),
    ("lora-biases-own", lora(bias="lora_only"), ("bert", "gpt2", "vit"), ()),
    ("lora-biases-both", lora(bias="lora_only", lora_bias=True), ("bert",), ()),
    (
        "lora-modules",
        lora(modules_to_save=["ln_f", "norm", "final_layer_norm", "token_type_embeddings"]),
        EVERY[:4],
        (),
    ),
    ("adalora", adalora(), EVERY, ()),
    ("adalora-pruned", adalora(pruned=True), EVERY, ()),
    ("ia3", ia3, EVERY, ()),
    ("lokr", lokr(), ("bert", "llama-gqa", "t5", "vit"), ()),
    ("lokr-thin", lokr(decompose_both=True, r=1), ("bert", "llama-gqa"), ()),
    ("lokr-factor", lokr(decompose_factor=4, alpha_pattern={"value": 5, "v_proj": 5}), ("bert", "llama-gqa", "t5"), ()),
    ("prefix", prefix, EVERY[:4], ()),
    ("prefix-projected", projected, EVERY[:4], ()),
    ("prefix-even", prefix, ("t5",), ()),
    ("prompt", prompt, ("bert", "gpt2", "llama-gqa", "t5"), ()),
    ("p-tuning-mlp", p_tuning("MLP"), ("bert", "gpt2", "llama-gqa", "t5"), ()),
    ("p-tuning-lstm", p_tuning("LSTM"), ("bert", "gpt2"), ()),
)


#: ViT has no task in peft, so that of its head only the bias is trained.
NOTES = {("lora-biases-all", "vit"): ("classifier.weight stay as they are",)}


def _heads(name: str, architecture: str) -> list[Head]:
    """Heads that peft trains along, and language models, in turn; prompts only where the head reads the text."""
    heads = list(TASKS[architecture])
    if name in ("lora", "prefix"):
        return heads
    if name == "lora-all-linear":
        return heads[:1]
    return [heads[-1] if name.startswith(("prefix", "prompt", "p-tuning")) else heads[len(name) % len(heads)]]


#: peft's prefixes are for models whose heads together are as wide as the states; an even number of layers shares slots.
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("prefix", "t5"): {"d_kv": 8},
    ("prefix-projected", "t5"): {"d_kv": 8},
    ("prefix-even", "t5"): {"d_kv": 8, "num_layers": 4, "num_decoder_layers": 4},
}
CASES = [
    Case(
        name,
        ARCHITECTURES[architecture],
        head,
        builder,
        NOTES.get((name, architecture), notes),
        CHANGES.get((name, architecture), {}),
    )
    for name, builder, architectures, notes in TUNERS
    for architecture in architectures
    for head in _heads(name, architecture)
]
