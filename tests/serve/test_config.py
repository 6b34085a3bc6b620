"""The configuration of `loradock serve`: what it takes, and everything it says about what it does not take."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from loradock_adapters.errors import UsageError
from loradock_serve import stores
from loradock_serve.config import (
    AdmissionConfig,
    DedicatedConfig,
    EngineConfig,
    ServeConfig,
    default_data_dir,
    load_config,
    read_admin_key,
)
from loradock_serve.errors import ServeConfigError


def problems(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ServeConfigError) as caught:
        load_config(None, data)
    head, *lines = str(caught.value).splitlines()
    assert head == f"the command line has {len(lines)} problem(s):"
    return [line.strip() for line in lines]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_base_alone_is_enough() -> None:
    config = load_config(None, {"base": "org/model"})
    assert (config.host, config.port, config.is_loopback) == ("127.0.0.1", 8080, True)
    assert config.data_dir == default_data_dir()
    assert config.engine.vllm_arguments == {}


def test_file_is_read_and_flags_go_over_it(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "base: a/b\nport: 1\nengine: {max_loras: 2, max_num_seqs: 8}\ndata_dir: ~/here\n")
    config = load_config(path, {"port": 2, "base": None, "host": None})
    assert (config.base, config.port, config.engine.max_loras) == ("a/b", 2, 2)
    assert config.engine.vllm_arguments == {"max_num_seqs": 8}
    assert config.data_dir == Path.home() / "here"


def test_relative_base_in_a_file_is_meant_from_that_file(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    path = write(tmp_path / "c.yaml", "base: models/mine\n")
    assert load_config(path, {}).base == str(tmp_path / "models" / "mine")
    assert load_config(write(path, "base: ./nowhere\n"), {}).base == str(tmp_path / "nowhere")
    assert load_config(path, {"base": "./flag"}).base == "./flag"


def test_relative_places_in_a_file_are_meant_from_that_file_and_those_of_flags_are_not(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "base: x\ndata_dir: data\nadmin_key_file: ../key\n")
    config = load_config(path, {})
    assert (config.data_dir, config.admin_key_file) == (tmp_path / "data", tmp_path / ".." / "key")
    assert load_config(path, {"data_dir": Path("flag")}).data_dir == Path("flag")
    write(path, "base: x\ndata_dir: ~/data\nadmin_key_file: /etc/key\n")
    config = load_config(path, {})
    assert (config.data_dir, config.admin_key_file) == (Path.home() / "data", Path("/etc/key"))


def test_place_that_is_no_text_is_a_problem_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match="data_dir"):
        load_config(write(tmp_path / "c.yaml", "base: x\ndata_dir: 7\n"), {})


def test_unreadable_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml", {})


def test_all_problems_are_reported_at_once_each_with_its_key() -> None:
    found = problems(
        {
            "prot": 1,
            "port": 70000,
            "max_body_bytes": 1,
            "engine": {"max_loras": 4, "max_cpu_loras": 2, "model": "x", "max_num_seq": 3},
            "dedicated": {"idle_timeout_s": 0, "max_engine": 1},
        }
    )
    assert found == [
        "base: missing, and needed",
        "port: Input should be less than or equal to 65535 (given: 70000)",
        "max_body_bytes: Input should be greater than or equal to 1024 (given: 1)",
        "engine.model: Loradock sets this itself: name it as `base`",
        "engine.max_num_seq: vLLM 0.32.0 has no argument of this name; did you mean `max_num_seqs`?",
        "engine.max_cpu_loras: 2 is below engine.max_loras, 4",
        "dedicated.idle_timeout_s: Input should be greater than 0 (given: 0)",
        "dedicated.max_engine: unknown key; did you mean `max_engines`?",
        "prot: unknown key; did you mean `port`?",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"engine": {"url": "ftp://x"}}, "engine.url: 'ftp://x' starts with none of http://, https://, unix://"),
        ({"dedicated": {"engine": {"port": 1}}}, "dedicated.engine.port: Loradock sets this itself"),
        ({"engine": {"max_lora_rank": 12}}, "engine.max_lora_rank: Input should be 1, 8, 16"),
        ({"engine": {"dtype": "int8"}}, "engine.dtype: Input should be 'auto', 'bfloat16'"),
        ({"admission": {"max_wait": 3}}, "admission.max_wait: unknown key; did you mean `max_wait_s`?"),
        ({"admission": {"max_wait_s": 0}}, "admission.max_wait_s: Input should be greater than 0"),
        ({"admission": {"max_queue": 0}}, "admission.max_queue: Input should be greater than or equal to 1"),
        ({"admission": {"max_queue_per_tenant": 0}}, "admission.max_queue_per_tenant: Input should be greater"),
        ({"admission": {"weights": {"me": 0}}}, "admission.weights.me: Input should be greater than 0"),
        ({"admission": {"gather_s": -1}}, "admission.gather_s: Input should be greater than or equal to 0"),
        ({"port": "80"}, "port: Input should be a valid integer"),
    ],
)
def test_wrong_value_is_named_with_its_key(data: dict[str, Any], message: str) -> None:
    (problem,) = problems({"base": "x"} | data)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.com", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert load_config(None, {"base": "x", "host": host}).is_loopback is loopback


def test_data_dir_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert default_data_dir() == Path("/somewhere/loradock")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_data_dir() == Path.home() / ".local/share/loradock"


def key_config(tmp_path: Path, host: str, content: str | None) -> ServeConfig:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    return load_config(None, {"base": "x", "host": host, "admin_key_file": str(path)})


def test_key_comes_from_the_environment_before_the_file(tmp_path: Path) -> None:
    config = key_config(tmp_path, "0.0.0.0", "from-file\n")
    assert read_admin_key(config, {"LORADOCK_ADMIN_KEY": " from-env "}) == "from-env"
    assert read_admin_key(config, {}) == "from-file"
    assert read_admin_key(config, {"LORADOCK_ADMIN_KEY": " "}) == "from-file"


def test_loopback_needs_no_key() -> None:
    assert read_admin_key(load_config(None, {"base": "x"}), {}) is None


def test_other_address_without_a_key_is_refused() -> None:
    config = load_config(None, {"base": "x", "host": "0.0.0.0"})
    with pytest.raises(ServeConfigError, match=r"host 0\.0\.0\.0 is reachable .* set LORADOCK_ADMIN_KEY"):
        read_admin_key(config, {})


def test_key_file_that_is_empty_or_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match=r"admin_key_file: .* cannot be read"):
        read_admin_key(key_config(tmp_path, "127.0.0.1", None), {})
    with pytest.raises(ServeConfigError, match=r"admin_key_file: .* is empty"):
        read_admin_key(key_config(tmp_path, "127.0.0.1", " \n"), {})


@pytest.mark.parametrize("model", [ServeConfig, EngineConfig, DedicatedConfig, AdmissionConfig])
def test_every_field_has_a_docstring_with_its_default(model: type[BaseModel]) -> None:
    source = inspect.getsource(model)
    for name, field in model.model_fields.items():
        _, _, after = source.partition(f"    {name}: ")
        docstring = after.partition('    """')[2].partition('"""')[0]
        assert docstring, name
        assert field.is_required() or isinstance(field.default, BaseModel | dict) or "efault" in docstring, name


def test_wrong_key_of_ours_does_not_hide_a_wrong_vllm_argument(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "base: b\nengine: {dtype: int8, max_lora: 3, uds: x}\ndedicated: {max_engines: -1, engine: {prot: 1}}\n"
    )
    with pytest.raises(ServeConfigError) as caught:
        load_config(path, {})
    text = str(caught.value)
    assert "has 5 problem(s)" in text
    for part in (
        "engine.dtype:",
        "engine.max_lora: vLLM",
        "did you mean `max_loras`?",
        "engine.uds: Loradock sets",
        "dedicated.engine.prot:",
    ):
        assert part in text


def test_password_of_the_registry_is_shown_nowhere(tmp_path: Path) -> None:
    config = load_config(None, {"base": "x", "registry_url": "postgresql://u:s3cret@h/d"})
    assert "s3cret" not in repr(config) + str(config) + str(config.model_dump())
    assert stores.registry_url(config, {}) == "postgresql://u:s3cret@h/d"
    for wrong in ("postgresql://u:s3cret@h:port/d", "mysql://u:s3cret@h/d", 7):
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"base": "x", "registry_url": wrong}))
        with pytest.raises(ServeConfigError, match="registry_url: ") as caught:
            load_config(tmp_path / "serve.yaml", {})
        assert "s3cret" not in str(caught.value) + str(caught.value.__cause__)


def test_registry_is_the_environments_else_the_files_else_in_the_data_dir(tmp_path: Path) -> None:
    silent = load_config(None, {"base": "x", "data_dir": str(tmp_path)})
    assert stores.registry_url(silent, {}) == f"sqlite:///{tmp_path}/registry.sqlite"
    told = load_config(None, {"base": "x", "registry_url": "postgresql://h/file"})
    assert stores.registry_url(told, {stores.REGISTRY_URL: "postgresql://h/env"}) == "postgresql://h/env"
    assert stores.registry_url(told, {stores.REGISTRY_URL: ""}) == "postgresql://h/file"
