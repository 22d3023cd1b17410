"""The Hugging Face libraries send nothing and look nothing up, whether they are imported before purld or after."""

import subprocess
import sys

import pytest
from network_guard import LOG_VARIABLE

from purld.hub_offline import is_hub_model_cached

TELL = """
from huggingface_hub.utils import _telemetry, send_telemetry
send_telemetry("trl/SFTTrainer", library_name="trl", user_agent={"gpu": "secret"})
_telemetry._TELEMETRY_QUEUE.join()  # a thread of its own sends it
"""
ASK = f"""{TELL}
import contextlib
from huggingface_hub import HfApi, hf_hub_download
for look_up in (HfApi().model_info, lambda name: hf_hub_download(name, "config.json")):
    with contextlib.suppress(Exception):
        look_up("owner/name")
"""
DATASETS_ARE_OFFLINE = "assert datasets.config.HF_HUB_OFFLINE\n"


def attempts(program, tmp_path, monkeypatch):
    """Run a program in a process of its own, with telemetry and the hub allowed, and return what it tried to reach."""
    log = tmp_path / "attempts"
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv(LOG_VARIABLE, str(log))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return log.read_text() if log.exists() else ""


def test_the_guard_sees_what_a_thread_sends(tmp_path, monkeypatch):
    # Not the look-ups, which the library tries again for 20 seconds.
    assert "huggingface.co" in attempts(TELL, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "start",
    ["import purld\n", f"import huggingface_hub.constants, datasets\nimport purld\n{DATASETS_ARE_OFFLINE}"],
    ids=["purld first", "purld last"],
)
def test_nothing_leaves_once_purld_is_imported(start, tmp_path, monkeypatch):
    assert not attempts(start + ASK, tmp_path, monkeypatch)


def test_a_cached_model_is_found(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert not is_hub_model_cached("owner/name")
    assert not is_hub_model_cached("no id/at all")
    repository = tmp_path / "models--owner--name"
    for file, content in (("refs/main", "abc"), ("snapshots/abc/config.json", "{}")):
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(content)
    assert is_hub_model_cached("owner/name")
