"""What is damaged is named and passed over, whatever the damage."""

import json
import os
import shutil

import numpy as np
import pytest
import states

from metajax import training
from metajax.training import _checkpoint, manifest

_DATA = "ocdbt.process_0/manifest.ocdbt"  # small arrays are in there


def _cut(folder):
    (folder / _DATA).write_bytes((folder / _DATA).read_bytes()[:10])


def _flip(folder):
    content = bytearray((folder / _DATA).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / _DATA).write_bytes(content)


def _point_outside(folder):
    secret, path = folder.parent.parent / "secret", folder / "seal.json"
    secret.write_text("")
    body = json.loads(path.read_text())
    del body["sha256"]
    body["files"]["../../secret"] = {"bytes": 0, "sha256": manifest._digest(secret)}
    path.write_text(json.dumps({"sha256": manifest._digest_of(body), **body}))


def _link_outside(folder):
    path = folder / "_METADATA"
    shutil.move(path, folder.parent.parent / "elsewhere")
    path.symlink_to(folder.parent.parent / "elsewhere")


def _rename(folder):
    shutil.copytree(folder, folder.parent / "9")


def _write_seal(text):
    return lambda folder: (folder / "seal.json").write_text(text)


_DAMAGES = {
    "last/2 was never finished": lambda folder: (folder / "seal.json").unlink(),
    "last/2/_METADATA is missing": lambda folder: (folder / "_METADATA").unlink(),
    f"last/2/{_DATA} is 10 bytes, was ": _cut,
    f"last/2/{_DATA} has other bytes than were written": _flip,
    "last/2/seal.json has other bytes than were written": _write_seal('{"sha'),
    "last/2/seal.json has other bytes than": _write_seal('{"sha256": "", "files": {}}'),
    "last/2/seal.json has other bytes": _write_seal("[]"),
    "last/2/seal.json names '../../secret', which is outside of the folder": _point_outside,
    "last/2/seal.json names '_METADATA', which is outside of the folder": _link_outside,
    "last/9/seal.json is of step 2": _rename,
}


@pytest.mark.parametrize("told", _DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, told):
    checkpoints = training.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, states.small(step), {"step": step})
    checkpoints.close()
    _DAMAGES[told](tmp_path / "last" / "2")
    checkpoints = training.Checkpoints(tmp_path)
    sound = 2 if "9" in told else 1
    assert checkpoints.latest() == sound
    restored, extra = checkpoints.restore(states.small(0))
    checkpoints.close()
    states.assert_same(restored, states.small(sound))
    assert extra == {"step": sound}
    (line,) = checkpoints.damaged
    assert line.startswith(told)
    params, step = _checkpoint.restore_params(tmp_path)
    assert (step, params["w"].tolist()) == (sound, (np.arange(6.0) * sound).tolist())


def test_damage_after_the_first_look_is_found_by_restore(tmp_path, checkpoints):
    for step in (1, 2):
        checkpoints.save(step, states.small(step), {})
    assert checkpoints.latest() == 2
    _flip(tmp_path / "last" / "2")
    states.assert_same(checkpoints.restore(states.small(0))[0], states.small(1))
    assert checkpoints.latest() == 1


def test_where_nothing_is_whole_every_damage_is_told(tmp_path, checkpoints):
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*last$"):
        checkpoints.restore(states.small(0))
    for step in (1, 2):
        checkpoints.save(step, states.small(step), {})
        checkpoints.wait()
        (tmp_path / "last" / str(step) / "_METADATA").unlink()
    with pytest.raises(ValueError, match=r"that is whole: last/2/_METADATA is missing; last/1/_METADATA is missing"):
        checkpoints.restore(states.small(0))
    with pytest.raises(ValueError, match="that is whole: last/2/_METADATA is missing"):
        _checkpoint.restore_params(tmp_path)
    assert checkpoints.latest() is None


def test_damaged_ones_do_not_count_among_those_that_stay(tmp_path, checkpoints):
    for step in (1, 2):
        checkpoints.save(step, states.small(step), {})
    checkpoints.wait()
    _flip(tmp_path / "last" / "2")
    again = training.Checkpoints(tmp_path)
    assert again.latest() == 1
    again.save(3, states.small(3), {})
    again.close()
    assert sorted(os.listdir(tmp_path / "last")) == ["1", "3"]


def test_what_a_kill_left_unfinished_is_named_and_swept(tmp_path, checkpoints):
    checkpoints.save(1, states.small(1), {})
    checkpoints.wait()
    left = tmp_path / "last" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "last" / "1", left)
    (left / "seal.json").unlink()
    again = training.Checkpoints(tmp_path)
    assert again.latest() == 1
    assert again.damaged == ["last/2.orbax-checkpoint-tmp was never finished"]
    again.save(3, states.small(3), {})
    again.close()
    assert sorted(os.listdir(tmp_path / "last")) == ["1", "3"]
