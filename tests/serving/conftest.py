"""Two bundles, made once: one that was really trained, one with random weights and a chat
template; and a service whose model only recites."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lifecycle.bundle.manifest import write_manifest
from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.base import EngineOptions
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from serving.sampling import Defaults
from serving.service import ModelCard, Service, open_service
from tests.serving.running import MakeService, running
from tests.serving.scripted import ScriptedEngine

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve, 日本語, 😀! " * 20


@pytest.fixture(scope="session")
def stories_bundle(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as an ungated bundle."""
    checkpoint, bundle = data_dir / "stories260K" / "hf", tmp_path_factory.mktemp("stories")
    return _bundle(checkpoint, bundle, name="stories", gated=False)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a Llama with random weights, a tokeniser with a chat template."""
    folder = tmp_path_factory.mktemp("chat-model")
    _write_tokenizer(folder)
    _write_llama(folder, vocab_size=320)
    return folder


@pytest.fixture(scope="session")
def chat_bundle(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a chat template as a gated bundle that asks for temperature 0."""
    bundle = tmp_path_factory.mktemp("chat")
    defaults = {"temperature": 0.0, "max_new_tokens": 24, "eos_token_id": 2}
    (bundle / "generation_config.json").write_text(json.dumps(defaults))
    return _bundle(chat_model, bundle, name="tiny-chat", gated=True)


@pytest.fixture(scope="session")
def stories_url(stories_bundle: Path) -> Iterator[str]:
    """A server of stories260K."""
    with running(open_service(stories_bundle)) as url:
        yield url


@pytest.fixture(scope="session")
def chat_url(chat_bundle: Path) -> Iterator[str]:
    """A server of the model with a chat template."""
    with running(open_service(chat_bundle, options=EngineOptions(max_num_seqs=4))) as url:
        yield url


@pytest.fixture
def make_service(chat_bundle: Path) -> MakeService:
    """A service over a `ScriptedEngine` that recites a text, with the real text layer."""
    tokenizer = ChatTokenizer.load(chat_bundle)

    def make(text: str = "one two three four ", max_queue: int = 2, **engine: int) -> Service:
        script = tokenizer.encode(text)
        made = ScriptedEngine.make(script, tokenizer.vocab_size, **engine)
        card = ModelCard("scripted", gated=False, fingerprint=None, created=0)
        service = Service(card, made, tokenizer, Defaults(temperature=0.0), max_queue)
        service.engine, service.backend = made, made.backend  # type: ignore[attr-defined]
        return service

    return make


def _bundle(checkpoint: Path, bundle: Path, **manifest: object) -> Path:
    export_decoder(checkpoint, bundle, Cpu())
    for name in COMPANIONS:
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, bundle)
    write_manifest(bundle, manifest)
    return bundle


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _write_llama(folder: Path, vocab_size: int) -> None:
    hidden, inner, heads, kv_heads, layers = 64, 96, 4, 2, 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    kv = hidden * kv_heads // heads
    shapes = {"model.embed_tokens": (vocab_size, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm": (hidden,),
            f"{at}.post_attention_layernorm": (hidden,),
            f"{at}.self_attn.q_proj": (hidden, hidden),
            f"{at}.self_attn.k_proj": (kv, hidden),
            f"{at}.self_attn.v_proj": (kv, hidden),
            f"{at}.self_attn.o_proj": (hidden, hidden),
            f"{at}.mlp.gate_proj": (inner, hidden),
            f"{at}.mlp.up_proj": (inner, hidden),
            f"{at}.mlp.down_proj": (hidden, inner),
        }
    random = np.random.default_rng(0)
    weights = {
        f"{name}.weight": np.ones(shape, np.float32)
        if len(shape) == 1
        else random.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
