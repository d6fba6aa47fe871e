# SPDX-License-Identifier: BSD-3-Clause
"""The manifest's list of extensions that each slot loads after the fork."""

import pytest

from nbagent.core.errors import ImageInvalid
from nbagent.image import manifest

MANIFEST = 'python = "/usr/bin/python3"\nuser = "jovyan"\nhome = "/home/jovyan"\n'


def test_the_list_is_empty_by_default_and_not_stored_then():
    parsed = manifest.parse(MANIFEST.encode())
    assert parsed.extensions_after_fork == () and "extensions_after_fork" not in manifest.to_mapping(parsed)


def test_the_list_is_stored_and_restored():
    parsed = manifest.parse(('extensions_after_fork = ["jupyter_server_fileid"]\n' + MANIFEST).encode())
    assert parsed.extensions_after_fork == ("jupyter_server_fileid",)
    assert manifest.from_mapping(manifest.to_mapping(parsed)) == parsed


@pytest.mark.parametrize("text", [
    'extensions_after_fork = "x"\n', 'extensions_after_fork = ["x y"]\n',
    'extensions_after_fork = ["x"]\nlaunch = "exec"\n',
])
def test_the_list_is_validated(text):
    with pytest.raises(ImageInvalid, match="extensions_after_fork: "):
        manifest.parse((text + MANIFEST).encode())
