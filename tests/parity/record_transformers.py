"""Records what `transformers` computes with the models of transformers_cases.py, into transformers.json.

pip install torch transformers safetensors
cd tests/parity && python record_transformers.py MINILM SMOLLM2    # folders: all-MiniLM-L6-v2, and of make_smollm2.py
"""

import json
import pathlib
import sys
import tempfile

TEXTS = ["Set an alarm for 7 o'clock, please.", "How much money is in my account?", "Ünïcode: naïve café"]
PROMPT = "The capital of France is"


def main() -> None:
    """Writes the hidden states of encoders, and the logits of decoders."""
    import torch
    import transformers
    import transformers_cases as cases

    recorded = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    for family, config in cases.CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            cases.write(pathlib.Path(folder), family)
            kind = getattr(transformers, config["architectures"][0])
            options = {"add_pooling_layer": False} if family in ("bert", "xlm-roberta", "vit") else {}
            model = kind.from_pretrained(folder, attn_implementation="eager", **options).eval()
        given = cases.inputs(family)
        with torch.no_grad():
            if family == "vit":
                images = torch.tensor(given["images"]).permute(0, 3, 1, 2)
                found = model(pixel_values=images).last_hidden_state
            else:
                found = model(
                    input_ids=torch.tensor(given["tokens"]).long(), attention_mask=torch.tensor(given["mask"]).long()
                )
                found = found.logits if hasattr(found, "logits") else found.last_hidden_state
        recorded[family] = found.double().numpy().round(7).tolist()
    recorded["minilm"], recorded["smollm2"] = _minilm(sys.argv[1]), _smollm2(sys.argv[2])
    path = pathlib.Path(__file__).with_name("transformers.json")
    path.write_text(json.dumps(recorded) + "\n", encoding="utf-8")


def _minilm(folder: str) -> dict[str, object]:
    """Means of the hidden states of real weights."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**given).last_hidden_state
    kept = given["attention_mask"][..., None].float()
    means = (hidden * kept).sum(1) / kept.sum(1)
    tokens = [
        ids[: int(mask.sum())].tolist() for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]
    return {"texts": TEXTS, "tokens": tokens, "means": means.double().numpy().round(6).tolist()}


def _smollm2(folder: str) -> dict[str, object]:
    """Some logits of real weights, and what they write."""
    import torch
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokens = [tokenizer(text)["input_ids"] for text in TEXTS]
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, :, ::4096].double().numpy().round(6).tolist() for ids in tokens]
        prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
        written = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    return {
        "texts": TEXTS, "tokens": tokens, "logits": logits,
        "prompt": PROMPT, "written": written.tolist(), "read": tokenizer.decode(written),
    }  # fmt: skip


if __name__ == "__main__":
    main()
