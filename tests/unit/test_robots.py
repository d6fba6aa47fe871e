# SPDX-License-Identifier: BSD-3-Clause
"""Programs that follow links, and browsers of people, by their User-Agent as their makers document it."""

from __future__ import annotations

import pytest

from nbagent.core.robots import is_robot

CHROME = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36"


@pytest.mark.parametrize("user_agent", [
    "Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)",
    "Slack-ImgProxy (+https://api.slack.com/robots)",
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm)",
    "Mozilla/5.0 (compatible; Google-InspectionTool/1.0;)",
    "facebookexternalhit/1.1 (+http://www.facebook.com/externalhit_uatext.php)",
    "meta-externalagent/1.1 (+https://developers.facebook.com/docs/sharing/webmasters/crawler)",
    "Twitterbot/1.0", "LinkedInBot/1.0 (compatible; Mozilla/5.0; +http://www.linkedin.com)",
    "TelegramBot (like TwitterBot)", "Mozilla/5.0 (compatible; Discordbot/2.0; +https://discordapp.com)",
    "WhatsApp/2.23.20.0", "Mattermost-Bot/1.1", "http.rb/5.1.1 (Mastodon/4.2.1; +https://example.social/) Bot",
    "Mozilla/5.0 (Windows NT 6.1; WOW64) SkypeUriPreview Preview/0.5 skype-url-preview@microsoft.com",
    "Mozilla/4.0 (compatible; ms-office; MSOffice 16)", "Microsoft Office Word 2014 (16.0.17628) Windows NT 10.0",
    "Mozilla/5.0 (compatible; Baiduspider/2.0; +http://www.baidu.com/search/spider.html)",
    "Mozilla/5.0 (compatible; YandexBot/3.0; +http://yandex.com/bots)",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.2; +https://openai.com/gptbot)",
    "Mozilla/5.0 (compatible; archive.org_bot +http://archive.org/details/archive.org_bot)",
    "Discourse Forum Onebox v3.3.0", "Mozilla/5.0 (compatible; Bluesky Cardyb/1.1; +mailto:support@bsky.app)",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; Claude-User/1.0; +Claude-User@anthropic.com)",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; Perplexity-User/1.0; +https://perplexity.ai/)",
    "Mozilla/5.0 (X11; Linux x86_64; rv:100.0) Gecko/20100101 Firefox/100.0 Sphinx/7.2.6", "lychee/0.15.1",
    "W3C-checklink/4.81 libwww-perl/5.837", "Mozilla/5.0 (compatible; LinkChecker/10.2; +https://example.org/)",
    "Mozilla/5.0 (compatible; Yeti/1.1; +http://naver.me/spd)", "Uptime-Kuma/1.23.13", "Blackbox Exporter/0.24.0",
    "check_http/v2.3.3 (monitoring-plugins 2.3.3)", "Google Favicon", "Google-Site-Verification/1.0",
    "APIs-Google (+https://developers.google.com/webmasters/APIs-Google.html)",
    "Mozilla/5.0 (compatible; CensysInspect/1.1; +https://about.censys.io/)",
    "CCBot/2.0 (https://commoncrawl.org/faq/)", "Pingdom.com_bot_version_1.4_(http://www.pingdom.com/)",
])
def test_a_program_that_follows_links_is_recognised(user_agent: str) -> None:
    assert is_robot(user_agent)


@pytest.mark.parametrize("user_agent", [
    "", CHROME, CHROME.replace("Chrome/", "HeadlessChrome/"), "curl/7.88.1", "python-requests/2.32.3",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:127.0) Gecko/20100101 Firefox/127.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Mobile/15E148",
    "Mozilla/5.0 (Linux; Android 11; CUBOT NOTE 20) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0 Mobile",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Mobile/21F90 [FBAN/FBIOS;FBAV/468.0]",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Slack/4.39.90 Chrome/126.0 Electron/31.2",
    "Mozilla/5.0 (Linux; Android 14) AppleWebKit/537.36 Chrome/126.0 Mobile Safari/537.36 [LinkedInApp]",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/124.0 YaBrowser/24.6 Safari/537.36",
])
def test_the_browser_of_a_person_is_none(user_agent: str) -> None:
    assert not is_robot(user_agent)
