"""The fields that every config shares. A config changes values, never names, so that flags are the same everywhere."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """Every field with its default."""
    return ConfigDict(
        {
            "seed": 0,
            # run folder whose network this run begins with; heads that do not fit are made anew. "" none
            "init": "",
            "data": {
                # glyphs, omniglot, image_folder, tfds, sinusoids, cycles, text, squad, multiple_choice; cifar_fs,
                # fc100, mini_imagenet, tiered_imagenet, cub, meta_dataset
                "name": "glyphs",
                # folder of the images; file of the texts, with {} for the language (squad), or a folder of files
                # (multiple_choice); of tfds, where sets are prepared ("": as TFDS does)
                "path": "",
                "val_path": "",  # text: other files for validation and test; "": as path
                "test_path": "",
                "text": "text",  # text: columns
                "label": "label",
                "domain": "",  # text: column of domains, or a .json file of labels by domain; "" none
                "divides": "class",  # text: what splits hold, classes, or whole domains ("domain")
                "names": {
                    "train": (),
                    "val": (),
                    "test": (),
                },  # text, squad, multiple_choice: those of each split; none: 64, 16 and 20 %
                "at_least": 0,  # classes of fewer examples are left out (articles or kinds of fewer questions)
                "languages": {"train": (), "val": (), "test": ()},  # squad: those of each split
                "overlap": 128,  # squad: tokens that neighbouring windows of a long context share
                "prefix": "",  # text: stands before every text, such as E5's "query: "
                "long": "truncate",  # text: what becomes of texts of more tokens than length, truncate or refuse
                "tokenizer": "",  # of texts: tokenizer.json, or its folder; "": model.path
                "set": "",  # tfds: name of the set, such as cifar100
                "splits": "",  # image_folder, tfds: published class lists, such as fc100; "" divides by 64, 16 and 20 %
                "cache_mib": 0,  # memory for decoded images; 0 holds them all
                "size": 0,  # pixels; 0: 28 for characters, 32 for CIFAR, 84 for ImageNet, else as the images are
                "channels": 0,  # image_folder, tfds: 1 grey, 3 RGB, 0 as the files are
                "invert": "",  # image_folder, tfds: "" no, "auto" dark on white becomes white on black
                "protocol": "vinyals",  # omniglot: vinyals or lake
                "rotations": True,  # omniglot: rotated training classes are new classes
                "mirrored": False,  # omniglot: mirror images of training classes are new classes
                "vocab": 256,  # cycles: number of tokens
                "length": 64,  # text, squad, multiple_choice, cycles: tokens of a text, at most
                "buckets": (),  # of texts: lengths that batches come in; (): a quarter of it, a half and all of it
                "sampler": "pipeline",  # who draws training episodes: tf.data on the host, or the device
            },
            # random affine map of each training image: degrees, fractions; all 0 changes nothing. words: share of the
            # tokens of a training text that are hidden
            "augment": {"rotation": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0, "words": 0.0},
            "model": {
                "name": "conv4",  # conv4, resnet12, vit, mlp, decoder (for cycles), pretrained (for texts)
                "path": "",  # pretrained: a folder with config.json and model.safetensors
                # pretrained: mean, cls, span (for squad), ...; "" that of its architecture; of a decoder features, or
                # logits of tokens (for multiple_choice and in_context)
                "head": "",
                "width": 64,  # resnet12: of the first block; the others have 2.5, 5 and 10 times as much
                "depth": 4,  # blocks
                "heads": 8,  # vit, decoder
                "patch": 4,  # vit: side of a patch in pixels
                "dtype": "float32",  # vit, decoder, pretrained: of the parameters, float32 or bfloat16
                "frozen": False,  # pretrained: nothing of it is trained; its features are computed once, and kept
                # pretrained: what is computed again in the backward pass, to save memory: none, a block at a time, or a
                # block for one example at a time (example; of data.name=multiple_choice all of a question at a time)
                "remat": "block",
                "pool": False,  # conv4: halve by max pooling instead of stride
                "normalisation": "batch",  # conv4, resnet12: batch (transductive), support, layer, group, none
                "hidden": (40, 40),  # mlp
            },
            # vit, decoder, pretrained: lora, ia3, bitfit, bottleneck or prefix beside the kernels that a path regex
            # picks ("": those of its paper), or prompt. rank is of lora, units of a bottleneck, positions of a prefix
            # or prompt. What an adapter adds adapts inside of a task with learner.adapts, and alone is trained with
            # outer.trainable: "lora" both.
            "adapter": {"name": "", "rank": 8, "where": ""},
            "learner": {
                # maml, meta_sgd, reptile, bayesian, prototypical, finetune, in_context; without labels: moco, simclr
                "name": "prototypical",
                "distance": "euclidean",  # prototypical: euclidean, cosine or centred_cosine
                "scale": 0.0,  # prototypical: of its logits; 0 is 1 for Euclidean distances and 10 for cosines
                "adapts": "",  # maml, meta_sgd, reptile, bayesian: path regex of what adapts; "" all
                "proximal": 0.0,  # maml: weight of the proximal term
                "rates": "weight",  # meta_sgd: a learned rate, from inner.rate on, for each weight or array
                "each_step": False,  # meta_sgd: whether each inner step has rates of its own
                "batch_size": 0,  # reptile: examples in an inner step; 0 all
                "beta": 0.01,  # bayesian: weight of the divergence of a task's posterior from the prior
                "deviation": 0.1,  # bayesian: standard deviation of a weight in the first prior
                "samples": 1,  # bayesian: draws of the weights in an inner step and in the outer loss
                "head": "linear",  # finetune: linear or cosine
                "labels": (),  # in_context: what classes are called, as text; () letters
                "separator": " =>",  # in_context: text between an input and its label
                "end": "\n",  # in_context: text behind a demonstration
                "content_free": "",  # in_context: a text that says nothing, to calibrate by; "" does not
            },
            # moco, simclr: divisor of the cosines, size of the compared vectors, hidden units of the heads. moco: share
            # of the average that stays in a step, keys of earlier batches (0 is MoCo v3)
            "contrast": {"momentum": 0.99, "queue": 4096, "temperature": 0.2, "dim": 128, "hidden": 256},
            # mixed_mode, unrolled, first_order, displacement, finite_difference, forward_mode, implicit, sama
            "hypergrad": {"name": "mixed_mode"},
            "episode": {
                "ways": 5,
                "max_ways": 0,  # above 0: the number of ways is drawn from ways to max_ways
                "shots": 1,
                "max_shots": 0,  # above 0: the number of shots is drawn from shots to max_shots
                "queries": 15,
                "imbalanced": 0,  # above 0: the largest support set, drawn by the rule of Meta-Dataset instead of shots
                "hierarchical": False,  # classes of one alphabet, script, domain
            },
            "train_episode": {  # 0: as episode
                "ways": 0,
                "max_ways": 0,
                "shots": 0,
                "max_shots": 0,
                "queries": 0,
                "imbalanced": 0,
                "hierarchical": False,
            },
            # stages of training before that on train_episode: until=(200, 500) ways=(5, 10) takes 5 classes until step
            # 200 and 10 until step 500. A number for each stage, size in pixels; 0, or (): as in the last stage
            "curriculum": {"until": (), "ways": (), "shots": (), "size": ()},
            # count tasks of earlier steps come again in each step, from a memory of capacity tasks (0: none): a sample
            # of all so far, or with by_loss (extra replay) the newest, those of higher loss more often
            "replay": {"capacity": 0, "count": 4, "by_loss": False},
            # eval_rate, eval_steps: instead of them in validation, evaluation and deployment; 0: as in training
            "inner": {"optimizer": "sgd", "rate": 0.4, "steps": 1, "eval_rate": 0.0, "eval_steps": 0},
            "outer": {
                "optimizer": "adam",  # adam or sgd
                "rate": 1e-3,
                "schedule": "cosine",  # constant, cosine, linear
                "clip": 10.0,  # global norm of the hypergradient; 0 does not clip
                "steps": 1000,
                "meta_batch": 4,  # tasks in a step; for finetune, moco, simclr: examples
                # share that stays in a step of an average of the meta-parameters, which is evaluated instead of them;
                # 0: none is kept
                "average": 0.0,
                "trainable": "",  # path regex of what is meta-trained; "" all
                "task_batching": "auto",  # how a device runs its tasks: auto, vmap, scan, or tasks at a time, as "4"
            },
            # devices: that take different tasks, that divide parameters as well, that divide the work of a task.
            # One may be -1: what is left. A run may go on with other ones.
            "mesh": {
                "task": -1,
                "fsdp": 1,
                "model": 1,
                "rules": (),  # pairs such as ("dense/kernel", (None, "fsdp")); (): large parameters over fsdp
            },
            "watch": {
                "nonfinite": "stop",  # a step whose loss or hypergradient is not finite: stop, or skip
                "skip_limit": 100,  # skipped steps in a row that end the run
                "spike": "off",  # a loss far above those before: off, count, stop, rollback (to the last checkpoint)
                "window": 100,  # losses before it that it is compared with
                "factor": 10.0,  # spreads above their median
                "rollbacks": 3,  # spikes after which a run is given up
                "heartbeat": 10.0,  # seconds between writings of heartbeat.json
                # seconds without a step after which a process ends; 0: 1800 in a job of several processes, else never
                "stall": 0.0,
            },
            "log": {"every": 20, "before": False},  # before: also measure the query before adaptation
            "validation": {"every": 500, "episodes": 100},
            "evaluation": {"episodes": 600, "seed": 0},
            "checkpoint": {"every": 500},
        }
    )
