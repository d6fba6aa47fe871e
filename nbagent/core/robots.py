# SPDX-License-Identifier: BSD-3-Clause
"""Programs that follow links without a person: crawlers, link previews, mail scanners. By the names that they send in
User-Agent; one that sends the name of a browser is not recognised.

The regular expression is read by Python and by HAProxy (PCRE2).
"""

from __future__ import annotations

import re

# General words first: most crawlers call themselves a bot, with a letter or digit of their own name before it. The
# telephones of the maker Cubot have it in the name of their model.
NAMES = (
    r"(?<!cu)bot\b", "crawl", "spider", "slurp", "preview",
    "archive.org", "barracuda", "bluecoat", "chrome-lighthouse", "contenttabreceiver", "embedly", "facebookexternalhit",
    "feedfetcher", "flipboard", "google-inspectiontool", "google-read-aloud", "google-safety", "googleother",
    "ia_archiver", "iframely", "lookyloo", "mastodon/", "mediapartners-google", "meta-external", "microsoft office",
    "mimecast", "ms-office", "outbrain", "pingdom", "proofpoint", "qwantify", "slack-imgproxy", "snap url",
    "vkshare", "w3c_validator", "whatsapp/", "zgrab",
)
PATTERN = "|".join(NAMES)
_ROBOT = re.compile(PATTERN, re.IGNORECASE)


def is_robot(user_agent: str) -> bool:
    """Whether a User-Agent is of a program that follows links without a person."""
    return _ROBOT.search(user_agent) is not None
