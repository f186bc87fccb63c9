from pathlib import Path

import pytest

from vlm.errors import ConfigError
from vlm.nodes.agent import environment


def test_the_list_the_file_and_the_names(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# a comment\n\nA=1\n HF_HOME=/file \nB='$(id)' # no comment\n")
    here = {"HF_HOME": "/here", "NCCL_DEBUG": "INFO", "HOME": "/root", "OWN": "x", "A_KEY": "y"}
    found = environment.collect(here, file, ["OWN", "C=a=b"])
    assert found == {
        "HF_HOME": "/file",
        "NCCL_DEBUG": "INFO",
        "A": "1",
        "B": "'$(id)' # no comment",
        "OWN": "x",
        "C": "a=b",
    }


@pytest.mark.parametrize("line", ["no equals sign", "1A=2", "A B=2", "=2", "A=1\nA=2"])
def test_a_bad_line_is_named_and_its_value_is_not(line: str) -> None:
    with pytest.raises(ConfigError, match=r"line \d") as caught:
        environment.parse(f"X=1\n{line.replace('2', 'hidden')}\n", "file")
    assert "hidden" not in str(caught.value)


def test_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="there is no such variable"):
        environment.collect({}, None, ["NOWHERE"])
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        environment.collect({}, None, ["a-b=1"])
    with pytest.raises(ConfigError, match="env file /nowhere"):
        environment.collect({}, Path("/nowhere"), [])


def test_a_hosts_secrets_stay_behind() -> None:
    host = {"PATH": "/bin", "RUNPOD_API_KEY": "a", "JUPYTER_PASSWORD": "b", "HF_TOKEN": "c"}
    found = environment.for_ranks(host, {"WANDB_API_KEY": "d"})
    assert found == {"PATH": "/bin", "HF_TOKEN": "c", "WANDB_API_KEY": "d"}


def test_hiding() -> None:
    env = {
        "A_TOKEN": "abcdef",
        "B_KEY": "abcdefgh",
        "C_KEY": "ab",
        "TOKENIZERS_PARALLELISM": "xxxxxx",
    }
    hidden = environment.secrets(env)
    assert hidden == ["abcdefgh", "abcdef"]
    assert environment.hide("x abcdefgh abcdef ab xxxxxx", hidden) == "x *** *** ab xxxxxx"
