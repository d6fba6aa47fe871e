# SPDX-License-Identifier: BSD-3-Clause
"""The files that the landing page loads ahead, from the text of bundles, and the sign in JupyterLab's page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_assets import added, image_with

from nbagent.image import ahead
from nbagent.zygote import page

# As Rspack and webpack write them: the first chunks, the modules that each chunk needs, and their chunks.
RSPACK = (
    'let n=(await Promise.all([t.e(10),t.e(5e3)]).then(t.bind(t,81220))).main;window.addEventListener("load",n);'
    'x={chunkMapping:{10:["48056"],5e3:["57417","7"],77:["9"]},moduleIdToConsumeDataMapping:{48056:{shareScope:"default",'
    'fallback:()=>Promise.all([w.e(11),w.e(12)]).then(()=>()=>w(99889)),treeShakingMode:null},'
    '57417:{shareScope:"default",fallback:()=>w.e(13).then(()=>()=>w(1))},7:{shareScope:"x",import:null},'
    '9:{shareScope:"default",fallback:()=>w.e(14).then(()=>()=>w(2))}}}'
)
WEBPACK = (
    'let r=(await Promise.all([t.e(10),t.e(5e3)]).then(t.bind(t,15136))).main;window.addEventListener("load",r);'
    'var O={48056:()=>x("default","@a/b",false,[1,2,0,0],'
    "(()=>Promise.all([t.e(11),t.e(12)]).then((()=>()=>t(45899))))),"
    '57417:()=>x("default","@a/c",false,[2,6],(()=>t.e(13).then((()=>()=>t(2))))),'
    '9:()=>x("default","@a/d",false,[2],(()=>t.e(14).then((()=>()=>t(3)))))};'
    "var S={10:[48056],5e3:[57417,7],77:[9]};"
)
REMOTE = 'var a={"./index":()=>r.e(1).then(()=>1),"./extension":()=>Promise.all([r.e(2),r.e(3)]).then(()=>()=>r(1))};'
PAGE = '<script defer src="{{page_config.fullStaticUrl}}/main.0a1b.js?v=0a1b"></script>'


@pytest.mark.parametrize("script", [RSPACK, WEBPACK])
def test_chunks_of_shared_modules_follow_from_the_first_chunks(script: str) -> None:
    assert ahead.first_chunks(script) == ["10", "5000"]
    assert ahead.eager_chunks(script, ahead.first_chunks(script)) == {"10", "5000", "11", "12", "13"}


def published(tmp_path: Path, script: str, index: str = PAGE, **extension: str) -> list[str]:
    lab = "usr/share/jupyter/lab/static"
    archive = image_with({f"@x/y/{name}": text.encode() for name, text in {
        "package.json": '{"jupyterlab": {"_build": {"load": "static/remoteEntry.1.js"}}}',
        "static/remoteEntry.1.js": REMOTE, "static/2.ab.js": "2", "static/9.cd.js": "9", **extension}.items()})
    for name, text in (("index.html", index), ("main.0a1b.js", script), ("10.a0.js", "10"), ("11.a1.js", "11"),
                       ("14.a4.js", "14"), ("jlab_core.cc.js", "core"), ("ahead.json", "[]")):
        archive.add(f"{lab}/{name}", text.encode())
    found = json.loads((added(tmp_path, archive).static / "ahead.json").read_text())
    assert isinstance(found, list)
    return found


def test_the_list_names_published_files_of_the_first_page_with_their_query(tmp_path: Path) -> None:
    assert published(tmp_path, RSPACK) == [
        "lab/main.0a1b.js?v=0a1b", "lab/jlab_core.cc.js?v=cc", "lab/10.a0.js?v=a0", "lab/11.a1.js?v=a1",
        "lab-extensions/@x/y/static/remoteEntry.1.js", "lab-extensions/@x/y/static/2.ab.js?v=ab"]


def test_a_program_of_another_form_has_its_first_script_and_core_only(tmp_path: Path) -> None:
    assert published(tmp_path, "unknown")[:2] == ["lab/main.0a1b.js?v=0a1b", "lab/jlab_core.cc.js?v=cc"]


@pytest.mark.parametrize("entry", ["../../secret.js", "static/../x.js", "https://evil.test/x.js", 5, None, ["a"]])
def test_an_extension_without_a_published_entry_is_left_out(tmp_path: Path, entry: object) -> None:
    package = json.dumps({"jupyterlab": {"_build": {"load": entry}}})
    found = published(tmp_path, RSPACK, index="", **{"package.json": package})
    assert found == []


def test_large_files_are_not_loaded_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_MAX_BYTES", len(RSPACK) + 4)
    assert published(tmp_path, RSPACK) == ["lab/main.0a1b.js?v=0a1b", "lab/jlab_core.cc.js?v=cc"]


def test_a_page_of_jupyterlab_begins_with_a_sign_of_progress() -> None:
    source = '<head><script id="jupyter-config-data"></script></head><body class="jp-ThemedContainer"><script></script>'
    added_to = page.add(source)
    assert '<body class="jp-ThemedContainer"><style>#nbagent-sign' in added_to
    assert added_to.index("addEventListener") < added_to.index("jupyter-config-data\">")
    # After the configuration, which it changes, and without the marks of Jinja, because it is a part of a template.
    assert added_to.index("jupyter-config-data") < added_to.index("openWhenRestored") < added_to.index("<body")
    assert "{{" not in added_to and "{%" not in added_to and "{#" not in added_to and "\n  //" not in added_to
    assert page.add("<head></head><body>a login page</body>") == "<head></head><body>a login page</body>"
