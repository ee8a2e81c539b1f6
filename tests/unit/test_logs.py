"""Log lines are lines, in both forms, and hold no secret."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from spillway import logs
from spillway.errors import SpillwayError
from spillway.flow.health import note_state

TOKEN = "wagon-of-salt"
PASSWORD = "s3cret:p@ss"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in logs._CHATTY}
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.mark.parametrize("form", ["json", "console"])
def test_nothing_secret_is_logged(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({logs.FORMAT_VARIABLE: form}, secrets=[TOKEN])
    log = structlog.get_logger("spillway.test")
    log.info("connecting", url=f"postgresql://postgres:{PASSWORD}@db/app", password=PASSWORD, port=5432)
    log.info("headers", headers={"Authorization": f"Bearer {PASSWORD}", "X-Api-Key": PASSWORD, "Accept": ["a"]})
    log.info("dsn", dsn=f"host=db password='{PASSWORD}' dbname=app", note=f"the token is {TOKEN}")
    logging.getLogger("library").warning("Authorization: Basic %s", PASSWORD)
    try:
        raise RuntimeError(f"could not connect to http://elastic:{PASSWORD}@search:9200")
    except RuntimeError:
        local_secret = PASSWORD + "2"
        log.exception("failed")
        logging.getLogger("library").exception("failed too %d", len(local_secret))
    out, err = capsys.readouterr()
    assert out == ""
    assert PASSWORD not in err
    assert TOKEN not in err
    assert "postgresql://postgres:***@db/app" in err
    assert "host=db password=*** dbname=app" in err
    assert err.count("RuntimeError: could not connect to http://elastic:***@search:9200") == 2
    if form == "json":
        events = [json.loads(line) for line in err.splitlines()]
        assert events[0] == {
            "event": "connecting",
            "url": "postgresql://postgres:***@db/app",
            "password": "***",
            "port": 5432,
            "level": "info",
            "timestamp": events[0]["timestamp"],
        }


def test_json_where_there_is_no_terminal_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({logs.LEVEL_VARIABLE: "WARNING"})
    log = structlog.get_logger()
    log.info("quiet")
    log.warning("loud")
    logging.getLogger("library").info("quiet")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["loud"]


@pytest.mark.parametrize("env", [{logs.LEVEL_VARIABLE: "shout"}, {logs.FORMAT_VARIABLE: "xml"}])
def test_a_wrong_setting_is_named(env: dict[str, str]) -> None:
    with pytest.raises(SpillwayError, match=next(iter(env))):
        logs.configure(env)


def test_ordinary_text_stays() -> None:
    for text in ("the token is missing", "https://host:9200/index", "a@b: c@d", "http://h/p?x=1&y=2", "key 12:30:45"):
        assert logs.conceal(text) == text
    assert logs.conceal("http://h/?api_key=abc&x=1") == "http://h/?api_key=***&x=1"


@pytest.mark.parametrize(
    ("state", "level"),
    [("parked", "warning"), ("down", "warning"), ("full", "warning"), ("gap", "warning"), ("caught_up", "info")],
)
def test_a_state_that_somebody_should_look_at_is_a_warning(state: str, level: str) -> None:
    with structlog.testing.capture_logs() as lines:
        note_state("jobs~related", state, "idle", "why")
        note_state("jobs", state, "idle", "why")
    said = {"event": "sink state", "sink": "jobs", "state": state, "was": "idle", "reason": "why", "log_level": level}
    assert lines == [{**said, "of": "its related tables"}, said]
