"""Real systemd hosts for tests. `from testhost_driver import Host`; the command line is `tests/testhost`."""

TYPE_CHECKING = False  # type checkers take it for true; `typing` itself would cost more than all else here
if TYPE_CHECKING:
    from testhost_driver.host import Host as Host


def __getattr__(name: str) -> object:
    # Late, since `testhost exec` needs nothing of it and is most of what a test suite calls.
    if name == "Host":
        from testhost_driver.host import Host

        return Host
    raise AttributeError(name)
