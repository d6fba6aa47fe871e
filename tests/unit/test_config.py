# SPDX-License-Identifier: BSD-3-Clause
"""Settings of a host: defaults, the order of files, and the messages of errors."""

import dataclasses
import ipaddress

import pytest

from nbagent.config import host_config
from nbagent.core.errors import ConfigError


def test_defaults_are_a_whole_configuration(tmp_path):
    assert host_config.load(tmp_path / "nbagent.toml") == host_config.HostConfig()


def test_a_later_file_wins_key_by_key(tmp_path):
    (tmp_path / "nbagent.toml").write_text('[slots]\nmemory = "256M"\nttl = "1h"\n[images.r]\nwarm = 7\n')
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "20.toml").write_text('[slots]\nmemory = "300M"\n')
    (tmp_path / "conf.d" / "10.toml").write_text('[slots]\nmemory = "200M"\ncpu_weight = 20\n')
    loaded = host_config.load(tmp_path / "nbagent.toml")
    assert (loaded.slots.memory, loaded.slots.ttl, loaded.slots.cpu_weight) == (300 << 20, 3600.0, 20)
    assert (loaded.warm("r"), loaded.warm("minimal")) == (7, host_config.HostConfig().pool.warm)


def test_an_unknown_key_names_file_and_nearest_known_one(tmp_path):
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text('[slots]\nmemry = "1G"\n')
    with pytest.raises(ConfigError, match=r'a\.toml: unknown setting slots\.memry; did you mean "memory"') as caught:
        host_config.load(tmp_path / "nbagent.toml")
    assert caught.value.details["key"] == "slots.memry"


def test_the_former_name_of_the_landing_section_is_read_with_a_warning(tmp_path, caplog):
    file = tmp_path / "nbagent.toml"
    file.write_text('[door]\nrate = 7\n')
    assert host_config.load(file).landing.rate == 7
    assert f"{file}: section [door] is deprecated; rename it to [landing]" in caplog.text
    file.write_text('[door]\nrate = 0\n')
    with pytest.raises(ConfigError, match=r"nbagent\.toml: landing\.rate: expected"):
        host_config.load(file)
    file.write_text('[door]\nrate = 7\n[landing]\nrate = 8\n')
    with pytest.raises(ConfigError, match=r"door\.rate and landing\.rate are the same setting; expected only landing"):
        host_config.load(file)


def test_both_sections_may_be_present_as_after_an_upgrade(tmp_path):
    (tmp_path / "nbagent.toml").write_text('[landing]\n#rate = 60\ntitle = "A course"\n')
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text("[door]\nrate = 7\n")
    landing = host_config.load(tmp_path / "nbagent.toml").landing
    assert (landing.rate, landing.title) == (7, "A course")


@pytest.mark.parametrize(("text", "message"), [
    ("[slots", "not valid TOML"),
    ("slots = 3", "slots: expected a table"),
    ('[slots]\nmemory = "lots"', "slots.memory: expected a size"),
    ("[slots]\ncpu_weight = 0", "slots.cpu_weight: expected a whole number from 1 to 10000"),
    ("[slots]\ncpu_weight = true", "slots.cpu_weight: expected a whole number"),
    ('[slots]\ncpu_quota = "half"', "slots.cpu_quota: expected"),
    ('[slots]\nttl = "48h"', "slots.ttl: expected at most slots.ttl_max"),
    ('[slots]\nstorage = "2G"', "slots.storage: expected at most slots.memory"),
    ('[slots]\nmemory = "8G"', "slots.memory: expected at most slots.memory_max"),
    ('[host]\nlabel = "C-07"', "host.label: expected .auto. or 1 to 16"),
    ('[api]\ntrusted_networks = ["everyone"]', "api.trusted_networks: expected a list of networks"),
    ('[router]\npublic_url = "nb.example.org"', "router.public_url: expected"),
    ('[router]\nurl_mode = "port"', 'router.url_mode: expected "path" or "subdomain"'),
    ('[router]\nurl_mode = "subdomain"', "router.domain: expected a DNS name, because"),
    ('[router]\ndomain = "nb.example.org"', 'router.domain: expected "none", unless router.url_mode is "subdomain"'),
    ('[router]\nurl_mode = "subdomain"\ndomain = "10.0.0.7"', 'router.domain: expected "none" or a DNS name'),
    ('[router]\nurl_mode = "subdomain"\ndomain = "nb.-x"', "router.domain: expected"),
    ('[router]\nurl_mode = "subdomain"\ndomain = "nb.example"\npublic_url = "https://example"',
     'router.public_url: expected "auto" or router.domain with a scheme, as in "https://nb.example"'),
    ('[router]\ncookies = ["a;b"]', "router.cookies: expected a list of at most 16 names"),
    ('[router]\ncookies = "a"', "router.cookies: expected a list of at most 16 names"),
    ("images = 3", "images: expected a table"),
    ("[images.r]\nwarmth = 3", "unknown setting images.r.warmth"),
])
def test_a_wrong_setting_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "nbagent.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        host_config.load(tmp_path / "nbagent.toml")


@pytest.mark.parametrize("public_url", ["auto", "https://nb.example.org", "http://nb.example.org:8080"])
def test_a_domain_goes_with_its_own_public_url(public_url):
    router = {"url_mode": "subdomain", "domain": "nb.example.org", "public_url": public_url}
    assert host_config.parse({"router": router}).router.domain == "nb.example.org"


def test_every_setting_has_a_description():
    for section in dataclasses.fields(host_config.HostConfig):
        if section.name == "images":
            continue
        for setting in dataclasses.fields(getattr(host_config.HostConfig(), section.name)):
            assert setting.metadata["doc"].endswith("."), f"{section.name}.{setting.name}"


def test_only_this_host_is_trusted_by_default():
    trusted = host_config.HostConfig().api.trusted_networks
    assert trusted == (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


@pytest.mark.parametrize(("hostname", "label"), [
    ("c07.example.org", "c07"), ("Compute-Node-Number-Seventeen", "computenodenumbe"), ("_", "host"), ("", "host"),
])
def test_a_label_is_derived_from_any_hostname(hostname, label):
    assert host_config.derived_label(hostname) == label
