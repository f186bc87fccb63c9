"""Programs that tests need and no Python package brings.

``make test`` installs them where it may. Elsewhere a test that needs one skips and says why; under
``CI=true`` it fails instead, so that a green build has run everything.
"""

import os
import shutil

import pytest

#: Debian package -> names its program goes by
PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "openssh-client": ("ssh",),
    "openssh-server": ("sshd",),
    "pdsh": ("pdsh",),
}

#: Where daemons live; not on every user's PATH
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def find(package: str) -> str | None:
    """Path of the program of ``package``, if it is installed."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *SBIN])
    found = (shutil.which(name, path=path) for name in PROGRAMS[package])
    return next((program for program in found if program), None)


def require(package: str) -> str:
    """Path of the program of ``package``. Without it the test skips, or fails under CI=true."""
    program = find(package)
    if program is not None:
        return program
    reason = f"{package} is not installed; apt-get install {package}, or run `make test` as root"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (CI=true allows no skip)", pytrace=False)
    pytest.skip(reason)
