"""`engine: {url: …}`: a gateway in front of an engine that something else runs (here: another gateway)."""

from pathlib import Path

import pytest

from loradock_testing.loradock_server import LoradockServer, engine_socket, loradock_server
from loradock_testing.tiny_models import make_adapter
from loradock_testing.trained import PROMPTS, Trained

pytestmark = pytest.mark.engine


def test_attached_gateway_with_the_same_store_serves_base_and_adapters(
    server: LoradockServer, trained: Trained, tmp_path: Path
) -> None:
    engine = {"url": f"unix://{engine_socket(server)}"}
    with loradock_server(trained.base, server.data_dir, engine=engine) as attached:
        for model in ("base", "linear"):
            assert attached.tokens(model, PROMPTS[0], 8) == server.tokens(model, PROMPTS[0], 8)
        attached.loradock("push", str(make_adapter(tmp_path / "b", trained.base, 2)), "later")
        assert attached.tokens("later", PROMPTS[0], 8) == server.tokens("later", PROMPTS[0], 8)
        assert attached.tokens("later", PROMPTS[0], 8) != server.tokens("base", PROMPTS[0], 8)
    assert server.tokens("linear", PROMPTS[0], 8), "letting go must leave the engine alone"
