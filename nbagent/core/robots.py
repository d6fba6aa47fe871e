# SPDX-License-Identifier: BSD-3-Clause
"""Programs that follow links without a person: crawlers, link previews, mail scanners, link checkers, monitors. By the
names that they send in User-Agent; one that sends the name of a browser is not recognised.

The regular expression is read by Python and by HAProxy (PCRE2).
"""

from __future__ import annotations

import re

# General words first: most crawlers call themselves a bot, with a letter or digit of their own name before it. The
# telephones of the maker Cubot have it in the name of their model.
NAMES = (
    r"(?<!cu)bot\b", "crawl", "spider", "slurp", "preview",
    "apis-google", "archive.org", "barracuda", "blackbox exporter", "bluecoat", "cardyb", "censysinspect",
    "chatgpt-user", "check_http", "checklink", "chrome-lighthouse", "claude-user", "claude-web", "cohere-ai",
    "contenttabreceiver", "datadog/synthetics", "embedly", "facebookexternalhit", "feedfetcher", "flipboard",
    "google favicon", "google-adwords", "google-inspectiontool", "google-read-aloud", "google-safety",
    "google-site-verification", "googleother", "heritrix", "httrack", "ia_archiver", "iframely", "linkcheck",
    "lookyloo", "lychee/", "mastodon/", "mediapartners-google", "meta-external", "microsoft office", "mimecast",
    "mistralai-user", "ms-office", "netcraft", "newrelicpinger", "nutch", "onebox", "outbrain", "perplexity-user",
    "pingdom", "proofpoint", "qwantify", "site24x7", "slack-imgproxy", "snap url", "sphinx/", "statuscake",
    "uptime-kuma", "virustotal", "vkshare", "w3c_validator", "whatsapp/", "yeti/", "zgrab",
)
PATTERN = "|".join(NAMES)
_ROBOT = re.compile(PATTERN, re.IGNORECASE)


def is_robot(user_agent: str) -> bool:
    """Whether a User-Agent is of a program that follows links without a person."""
    return _ROBOT.search(user_agent) is not None
