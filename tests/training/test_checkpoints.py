from purld.training.checkpoints import last_checkpoint


def test_only_whole_checkpoints_count_and_torn_ones_are_removed(tmp_path):
    for step, whole in ((10, True), (9, True), (20, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / "complete").touch()
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", 10)
    assert not (tmp_path / "checkpoint-20").exists()


def test_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") == (None, 0)
