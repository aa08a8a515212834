"""Runs in the environment of llama.cpp: writes a Llama checkpoint as GGUF and quantises it.

    python peer_gguf.py CHECKPOINT FOLDER

Writes `F32.gguf`, then `Q8_0.gguf` and `Q4_0.gguf` by llama.cpp's own quantiser, and prints how
many bytes of matrices each has in which type.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

TYPES = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def write(checkpoint: Path, path: Path) -> None:
    """Write the checkpoint in float32, without a vocabulary: the peer is given token ids."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, values in load_file(checkpoint / "model.safetensors").items():
        if "q_proj" in name:
            values = interleaved(values, heads)
        elif "k_proj" in name:
            values = interleaved(values, kv_heads)
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp's rotary embedding: pairs side by side, not half a head apart."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def quantize(source: Path, path: Path, ftype: int) -> None:
    """Quantise as llama.cpp does it by default."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    if llama_cpp.llama_model_quantize(bytes(source), bytes(path), params):
        raise RuntimeError(f"llama.cpp could not write {path}")


def stored(path: Path) -> dict[str, dict[str, int]]:
    """Bytes by type of the matrix that is embedding and output head, and of the layers."""
    found = {"head": Counter(), "layers": Counter()}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            part = "layers" if tensor.name.startswith("blk") else "head"
            found[part][tensor.tensor_type.name] += int(tensor.n_bytes)
    return {part: dict(types) for part, types in found.items()}


def main() -> None:
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    write(checkpoint, folder / "F32.gguf")
    for name, ftype in TYPES.items():
        quantize(folder / "F32.gguf", folder / f"{name}.gguf", ftype)
    print(json.dumps({name: stored(folder / f"{name}.gguf") for name in TYPES}))


if __name__ == "__main__":
    main()
