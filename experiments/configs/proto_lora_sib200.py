"""Prototypical networks over low-rank adapters of multilingual E5: topics (SIB-200) in languages not trained on.

A task is one language. Test differs from training in languages and in sentences:

python -m experiments.train --config=experiments/configs/proto_lora_sib200.py --config.model.path=MULTILINGUAL_E5 \
    --config.data.files=sib200/train.tsv.gz --config.val_data.files=sib200/dev.tsv.gz \
    --config.test_data.files=sib200/test.tsv.gz
"""

from typing import Any

LANGUAGES = {
    "train": (
        "deu_Latn", "eng_Latn", "eus_Latn", "fra_Latn", "hun_Latn", "ind_Latn", "ita_Latn", "nld_Latn", "pol_Latn",
        "spa_Latn", "tgl_Latn", "tur_Latn", "vie_Latn", "arb_Arab", "ben_Beng", "ell_Grek", "hin_Deva", "jpn_Jpan",
        "kaz_Cyrl", "kor_Hang", "rus_Cyrl", "tam_Taml", "zho_Hans",
    ),
    "val": ("isl_Latn", "som_Latn", "hye_Armn", "pes_Arab"),
    # half in Latin script; the others in scripts that no language of training has
    "test": (
        "fin_Latn", "hau_Latn", "quy_Latn", "swh_Latn", "yor_Latn", "zul_Latn",
        "amh_Ethi", "heb_Hebr", "kat_Geor", "khm_Khmr", "mya_Mymr", "tha_Thai",
    ),
}  # fmt: skip


def get_config() -> dict[str, Any]:
    """7-way 5-shot episodes of one language each; its smallest class has 8 sentences in validation."""
    return {
        "data": {
            "name": "text", "label": "category", "domain": "lang", "split_by": "domain", "splits": LANGUAGES,
            "prefix": "query: ", "max_length": 96, "length_buckets": (32, 48, 64, 96),
        },
        "val_data": {"files": None},  # None: those of data
        "test_data": {"files": None},
        "model": {"name": "pretrained_model", "head": "mean"},
        "wrap": [{"name": "lora", "rank": 8, "where": "kernel"}],
        "learner": {"name": "prototypical", "distance": "cosine", "scale": 20.0},
        "episode": {"ways": 7, "shots": 5, "queries": 3, "hierarchical": True},
        "optimizer": {"adam": {"learning_rate": {"init_value": 2e-4}}},
        "training": {"steps": 500, "meta_batch": 2, "trainable": "lora"},
        "validation": {"every": 100, "episodes": 50},
        "checkpoint": {"every": 100},
    }  # fmt: skip
