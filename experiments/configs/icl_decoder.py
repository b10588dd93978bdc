"""In-context learning: a decoder reads the support set as text, and names the class of a query. No weight changes.

Training is MetaICL over low-rank adapters; the pretrained decoder alone is the checkpoint that training begins with:

python -m experiments.train --config=experiments/configs/icl_decoder.py --config.model.path=DECODER \
    --config.data.path=clinc150/data_full.json.gz --config.data.domain=clinc150/domains.json --workdir=RUN
python -m experiments.evaluate --workdir=RUN --checkpoint=start
"""

from ml_collections import ConfigDict

from experiments.configs._base import base
from experiments.configs.proto_lora_clinc import DOMAINS


def get_config() -> ConfigDict:
    """5-way 1-shot: a prompt of five demonstrations, whose classes are called by letters."""
    config = base()
    config.data.update(name="text", divides="domain", length=32, buckets=(16, 24, 32))
    config.data.names.update(DOMAINS)
    config.model.update(name="pretrained")
    config.adapter.update(name="lora", rank=8, where="query|value")
    config.learner.update(name="in_context", content_free="N/A")
    config.episode.update(ways=5, shots=1, queries=3)
    config.outer.update(rate=1e-3, schedule="linear", steps=120, meta_batch=2, trainable="lora")
    config.validation.update(every=120, episodes=20)
    config.checkpoint.every = 20
    return config
