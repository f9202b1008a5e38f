"""Posts of X, and the accounts of their authors, from a search of its API version 2 with tweepy.

Each page of results is stored as a line, as twarc writes it. The search goes back from the newest post; a later call
continues with the posts older than those in the file.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from raytrain.data.collecting import PATIENCE_S, Collection
from raytrain.utils.errors import UserError
from raytrain.utils.files import expanded
from raytrain.utils.retry import retry
from raytrain.utils.text import one_line

try:
    import requests
    import tweepy
except ImportError:  # an optional dependency
    tweepy = None

TOKEN = "X_BEARER_TOKEN"
"""Environment variable that holds the bearer token, unless a file does."""
SOURCE = "X API v2, recent search"
FEWEST, PAGE = 10, 100
"""Fewest and most posts that a request may ask for."""
LONGEST_QUERY = 512
REQUESTS, WINDOW = 450, "15 minutes"
"""Searches that X allows an app per time window (docs.x.com, rate limits, August 2026)."""
POST_PRICE, ACCOUNT_PRICE = 0.005, 0.010
"""US dollars per returned post and account (docs.x.com, pricing, November 2026)."""
POST_FIELDS = ("author_id", "created_at", "edit_history_tweet_ids", "lang", "note_tweet", "referenced_tweets")
ACCOUNT_FIELDS = ("description", "username")
TIMEOUT_S = 60.0


class Search:
    """Progress of a search, according to its file."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.posts = 0
        self.oldest: int | None = None

    def take(self, page: dict[str, Any]) -> None:
        """Count a page of the file."""
        for post in page.get("data") or ():
            self.posts += 1
            self.oldest = min(int(post["id"]), self.oldest or int(post["id"]))

    def page_sizes(self) -> Iterator[int]:
        """Yield the sizes of the next requests: never more than are left, and never leaving a rest below ``FEWEST``."""
        while (left := self.most - self.posts) >= FEWEST:
            size = min(PAGE, left)
            yield left - FEWEST if 0 < left - size < FEWEST else size


def read_token(file: Path | None) -> str:
    """Return the bearer token from a file or, without one, the environment.

    Raises:
        UserError: there is none, or it is not a token; the message does not repeat it.
    """
    where = TOKEN if file is None else f"--token-file {file}"
    try:
        text = os.environ.get(TOKEN, "") if file is None else expanded(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    token = text.strip()
    if not token:
        raise UserError(f"X asks for a bearer token: set {TOKEN}, or name the file that holds it by --token-file")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{where} holds more than a bearer token: white space or characters that none has")
    return token


def collect(query: str, output: Path, most: int, *, bios: bool, token_file: Path | None) -> None:
    """Add up to ``most`` posts that match ``query`` to the file ``output``; with ``bios`` also their authors' accounts.

    Raises:
        UserError: a value, a token or a file cannot be used, or X refuses the search or does not answer.
    """
    if tweepy is None:
        raise UserError("collecting from X needs the package tweepy: pip install 'raytrain[collect]'")
    if not query.strip() or len(query) > LONGEST_QUERY:
        raise UserError(f"the query has {len(query)} characters: must be from 1 to {LONGEST_QUERY}")
    if most < FEWEST:
        raise UserError(f"--most {most}: X gives at least {FEWEST} posts")
    token, search = read_token(token_file), Search(most)
    # tweepy logs the headers of requests, including the token
    logging.getLogger("tweepy.client").setLevel(logging.WARNING)
    origin = {"source": SOURCE, "query": query, "bios": "yes" if bios else "no"}
    with Collection(output, origin, search.take) as collection:
        print("\n".join(announcement(search, bios)), flush=True)
        client = tweepy.Client(token, return_type=dict)
        client.session.request = partial(client.session.request, timeout=TIMEOUT_S)  # tweepy sets no timeout
        for size in search.page_sizes():
            page = next_page(client, query, size, search.oldest, bios)
            if not page.get("data"):
                print("X has no older posts of the last 7 days")
                break
            collection.add(page)
            search.take(page)
            print(f"{search.posts:,} of {most:,} posts", flush=True)
    print(f"{output}: {search.posts:,} posts; read them by python -m raytrain.data prepare")


def announcement(search: Search, bios: bool) -> Iterator[str]:
    """Yield lines about what the rest of a search may take and cost, and its terms."""
    left = max(0, search.most - search.posts)
    had = f"{search.posts:,} posts are there; " if search.posts else ""
    yield f"{SOURCE} (the last 7 days): {had}up to {left:,} posts, in at least {-(-left // PAGE):,} requests"
    yield f"rate limit: X allows an app {REQUESTS} of these in {WINDOW}; beyond it this waits"
    cost = left * (POST_PRICE + bios * ACCOUNT_PRICE)
    accounts = f" and ${ACCOUNT_PRICE:.3f} an account" if bios else ""
    yield f"cost: at most ${cost:,.2f}, at ${POST_PRICE:.3f} a post{accounts}; console.x.com has your prices"
    yield "terms: the Developer Agreement and Policy of X: no foundation or frontier model, and only ids are passed on"


def next_page(client: Any, query: str, size: int, oldest: int | None, bios: bool) -> dict[str, Any]:
    """Return the page of posts older than ``oldest``; wait if the rate limit or the network requires it.

    Raises:
        UserError: X refuses the search, or does not answer for ``PATIENCE_S``.
    """
    accounts = {"expansions": ["author_id"], "user_fields": list(ACCOUNT_FIELDS)} if bios else {}
    ask = partial(
        client.search_recent_tweets,
        query,
        max_results=size,
        tweet_fields=list(POST_FIELDS),
        **accounts,
        **({} if oldest is None else {"until_id": oldest}),
    )
    while True:
        try:
            page = retry(
                ask,
                (tweepy.TwitterServerError, requests.RequestException),
                seconds=PATIENCE_S,
                log=lambda error: print(f"X does not answer, trying again: {_said(error, client)}", flush=True),
            )
        except tweepy.TooManyRequests as error:
            wait_for_limit(error, client)
            continue
        except tweepy.TwitterServerError as error:
            raise UserError(f"X does not answer: {_said(error, client)}; the same command continues") from None
        except tweepy.TweepyException as error:
            raise UserError(f"X refuses the search: {_said(error, client)}") from None
        except requests.RequestException as error:
            raise UserError(f"X cannot be reached: {_said(error, client)}; the same command continues") from None
        if not _is_page(page):
            raise UserError("X answers with something that is no page of posts")
        return dict(page)


def wait_for_limit(error: Any, client: Any) -> None:
    """Sleep until X allows the next search.

    Raises:
        UserError: X does not say when: the limit is not a rate limit but the account's quota.
    """
    reset = error.response.headers.get("x-rate-limit-reset", "")
    if not reset.isdecimal() or error.response.headers.get("x-rate-limit-remaining", "0") != "0":
        raise UserError(f"X gives no more posts: {_said(error, client)}; console.x.com shows limits and credits")
    seconds = max(1, int(reset) - int(time.time()) + 1)
    print(f"rate limit: X allows the next search in {seconds} s", flush=True)
    time.sleep(seconds)


def _is_page(page: Any) -> bool:
    posts = page.get("data") or [] if isinstance(page, dict) else None
    return isinstance(posts, list) and all(isinstance(post, dict) and str(post.get("id")).isdecimal() for post in posts)


def _said(error: Exception, client: Any) -> str:
    """Return an error as one line without the token, in case a server has repeated it."""
    return one_line(str(error).replace(client.bearer_token, "(token)"))[:300]
