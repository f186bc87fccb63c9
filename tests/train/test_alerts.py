import json
import logging
import math
from pathlib import Path

import pytest

from vlm import dist
from vlm.train.alerts import ALERTS, INCIDENTS, Alerts
from vlm.train.health import Alert

ALERT = Alert(7, "loss_spike", "warning", "the loss is 9")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_alert_reaches_console_file_and_view(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[Alert] = []
    alerts = Alerts(tmp_path, shown.append)
    with caplog.at_level(logging.INFO):
        alerts.tell([ALERT, Alert(8, "plateau", "info", "flat")])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert caplog.messages[0] == "[HEALTH] step 7: loss_spike: the loss is 9"
    found = rows(tmp_path / ALERTS)
    assert [row.pop("time") > 0 for row in found] == [True, True]
    assert found[0] == ALERT._asdict()
    assert shown[0] == ALERT
    assert alerts.num_alerts == 2


def test_incidents_are_appended_by_later_runs_too(tmp_path: Path) -> None:
    for loss in (math.nan, 4.0):
        Alerts(tmp_path, lambda alert: None).incident(3, "spike", "skip", loss=loss, keys=[["a"]])
    first, second = rows(tmp_path / INCIDENTS)
    assert (first["loss"], second["loss"], second["keys"]) == ("nan", 4.0, [["a"]])


def test_other_ranks_only_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    alerts = Alerts(tmp_path, lambda alert: pytest.fail("shown"))
    alerts.tell([ALERT])
    alerts.incident(1, "spike", "skip")
    assert list(tmp_path.iterdir()) == []
    assert (alerts.num_alerts, alerts.num_incidents) == (1, 1)
