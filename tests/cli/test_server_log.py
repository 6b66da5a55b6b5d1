"""What a Prefect server wrote when its scheduler failed: found, told in one line, once."""

from pathlib import Path

from cli.server_log import ServerLog, ServiceError

LINES = """
Check out the dashboard at http://127.0.0.1:4200

02:41:39.963 | ERROR   | docket.dependencies - ↩ [    71ms] schedule_recent_deployments(){schedule_recent_deployments}
Traceback (most recent call last):
  File "docket/worker.py", line 1134, in _execute
    result = await execution.function(
    raise exc.InvalidRequestError(
sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement; please supply a bulk_dml decorated function
02:41:40.001 | WARNING | prefect.server.services.foreman - a worker was late
02:41:44.970 | ERROR   | docket.dependencies - ↩ [    71ms] schedule_recent_deployments(){schedule_recent_deployments}
Traceback (most recent call last):
sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement; please supply a bulk_dml decorated function
02:41:45.100 | ERROR   | uvicorn.error - Invalid HTTP request received.
02:41:46.000 | ERROR   | prefect.server.events.actions - Error running action
"""
"""Of Prefect 3.8.8 with SQLAlchemy 2.1.9, the middle of the traceback left out; the last three lines made up."""
SCHEDULER = ServiceError(
    "schedule_recent_deployments",
    "sqlalchemy.exc.InvalidRequestError: "
    "Can't evaluate bulk DML statement; please supply a bulk_dml decorated function",
)


def test_the_first_error_of_each_service_is_found_once_however_the_log_grows(tmp_path: Path) -> None:
    for size in (1, 7, 100, 10_000):
        log, file = ServerLog(tmp_path / f"{size}.log"), tmp_path / f"{size}.log"
        assert log.look() == []  # not there yet
        text, found = LINES + "02:41:47.000 | INFO    | prefect - goes on\n", []
        with file.open("ab") as out:
            for start in range(0, len(text.encode()), size):
                out.write(text.encode()[start : start + size])
                out.flush()
                found += log.look()
        assert found == [SCHEDULER, ServiceError("prefect.server.events.actions", "Error running action")]


def test_what_an_earlier_server_wrote_is_not_reported(tmp_path: Path) -> None:
    file = tmp_path / "prefect.log"
    file.write_text(LINES)
    log = ServerLog(file)
    log.skip()
    assert log.look() == []
