"""Creates multiple-choice questions from labelled texts: which of several labels of the same domain does a text have?

    python -m experiments.intent_questions --data=data_full.json.gz --domain=domains.json --out=QUESTIONS

This writes QUESTIONS/DOMAIN.jsonl for `experiments.train --config=experiments/configs/maml_lora_choices.py`.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import flags

from metajax import run

_DATA = flags.DEFINE_string("data", None, "File of texts with labels, as of CLINC150.", required=True)
_DOMAIN = flags.DEFINE_string("domain", None, "A .json file of labels by domain.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the questions, one file a domain.", required=True)
_CHOICES = flags.DEFINE_integer("choices", 4, "Choices of a question, the right one among them.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the wrong choices and of their order.")


def main() -> int:
    """Writes the files of questions."""
    run.prepare()
    import numpy as np

    from experiments import _runs
    from metajax.core import _validate
    from metajax.data.readers import read_domains, read_rows, text_files

    out, rng = _runs.out_folder(_OUT.value), np.random.default_rng(_validate.int_at_least("seed", _SEED.value, 0))
    choices = _validate.int_at_least("choices", _CHOICES.value, 2)
    domains = read_domains(_DOMAIN.value)
    lines: dict[str, list[str]] = {}
    labels: dict[str, list[str]] = {}
    for label, domain in sorted(domains.items()):
        labels.setdefault(domain, []).append(label)
    for domain, known in labels.items():
        if not domain or domain != pathlib.PurePath(domain).name:
            raise ValueError(f"domain must hold names of domains that name files, got {domain!r}")
        if len({_shown(label) for label in known}) < len(known):
            raise ValueError(f"domain must hold labels that differ without underscores, got {known} for {domain!r}")
    few = sorted(domain for domain, known in labels.items() if len(known) < choices)
    if few:
        raise ValueError(f"choices must be at most the labels of each domain, got {choices} for {', '.join(few)}")
    for row in read_rows(text_files(_DATA.value), {"text": "text", "label": "label"}, None):
        if row.label not in domains:
            raise ValueError(f"domain must hold all labels, got none for {row.label!r}, of {row.where}")
        domain = domains[row.label]
        wrong = [label for label in labels[domain] if label != row.label]
        shown = [row.label, *rng.choice(wrong, choices - 1, replace=False)]
        order = rng.permutation(choices)
        question: dict[str, Any] = {
            "question": row.text,
            "choices": [_shown(shown[place]) for place in order],
        }
        lines.setdefault(domain, []).append(json.dumps(question | {"answer": int(order.argmin())}))
    if any(out.glob("*.jsonl*")):
        raise ValueError(f"out must be a folder without files of questions, got {str(out)!r}")
    out.mkdir(parents=True, exist_ok=True)
    for domain, written in lines.items():
        (out / f"{domain}.jsonl").write_text("\n".join(written) + "\n", encoding="utf-8")
        print(f"{len(written)} questions of {domain}")
    return 0


def _shown(label: str) -> str:
    return label.replace("_", " ")


if __name__ == "__main__":
    run.launch(main)
