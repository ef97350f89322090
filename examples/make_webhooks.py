"""Writes webhooks.jsonl: events in the shape of GitHub's webhooks, the same ones every time.

Run it as ``python make_webhooks.py``. Each line is what GitHub posts, with what it puts into headers as three fields:
``event``, ``delivery`` and ``signature``, an HMAC-SHA256 over the rest. One line is tampered with after it was signed.
"""

import hashlib
import hmac
import json
import random
import string
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

SECRET = b"not a secret: this is an example"
START = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)
REPOSITORIES = [
    *("acme/engine", "acme/website", "acme/docs"),
    *("kobo-lab/reader", "kobo-lab/typesetter", "northwind/billing"),
]
PEOPLE = ["ada", "bjarne-k", "chloe", "dmitri-v", "esra", "fumiko"]
TITLES = [
    "Fix a lost wake-up when the queue drains",
    "Añadir la exportación a CSV",
    "設定画面を日本語にする",
    "Überläufe beim Zählen vermeiden",
    "Поправить сортировку по дате",
    "Speed up the first page 🚀",
    "Keep the cursor where it was",
    "Document the retry rules — at last",
    "Drop support for old tokens",
    'Quote "names" with \\ and tabs\tproperly',
]
SENTENCE = "the queue holds each message until its handler is done and then lets the next one of the session go"
WORDS = SENTENCE.split()
Event = dict[str, Any]


class Maker:
    """Everything is drawn from one seeded generator, so that the file never changes by itself."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = dict.fromkeys(REPOSITORIES, 100)
        self.events: list[tuple[datetime, Event]] = []

    def add(self, when: datetime, event: str, repository: str, **payload: Any) -> None:
        self.events.append((when, {"event": event, **payload, "repository": self.repository(repository)}))

    def sha(self) -> str:
        return f"{self.random.getrandbits(160):040x}"

    def text(self, words: int) -> str:
        return " ".join(self.random.choices(WORDS, k=words)).capitalize() + "."

    def number(self, repository: str) -> int:
        self.numbers[repository] += 1
        return self.numbers[repository]

    def user(self, login: str) -> Event:
        return {"login": login, "id": 1000 + PEOPLE.index(login), "type": "User", "site_admin": False}

    def someone(self) -> Event:
        return self.user(self.random.choice(PEOPLE))

    def repository(self, full_name: str) -> Event:
        owner, _, name = full_name.partition("/")
        return {
            "id": 50_000 + REPOSITORIES.index(full_name),
            "name": name,
            "full_name": full_name,
            "private": owner == "northwind",
            "owner": {"login": owner, "type": "Organization"},
            "html_url": f"https://git.example/{full_name}",
            "default_branch": "main",
            "topics": ["queue", "日本語"] if owner == "kobo-lab" else ["queue"],
            "license": None,
        }

    # A pull request's life: every event of it follows from the one before.

    def pull_request_life(self, repository: str, start: datetime, *, slow_merge: bool) -> None:
        rng, number, when = self.random, self.number(repository), start
        author = self.someone()
        pull: Event = {
            "number": number,
            "state": "open",
            "title": rng.choice(TITLES),
            "body": self.text(rng.randrange(10, 80)),
            "user": author,
            "labels": [],
            "head": {"ref": f"{author['login']}/topic-{number}", "sha": self.sha()},
            "base": {"ref": "main", "sha": self.sha()},
            "draft": False,
            "merged": False,
            "mergeable": True,
            "commits": 1,
            "additions": rng.randrange(1, 200),
            "deletions": rng.randrange(60),
            "changed_files": rng.randrange(1, 12),
            "created_at": stamp(when),
        }

        def tell(event: str, action: str, **more: Any) -> None:
            nonlocal when
            pull["updated_at"] = stamp(when)
            payload = {"action": action, "number": number, "pull_request": json.loads(json.dumps(pull)), **more}
            self.add(when, event, repository, **payload, sender=self.someone())
            when += timedelta(seconds=rng.randrange(40, 1500))

        tell("pull_request", "opened")
        for _ in range(rng.randrange(1, 4)):
            for _ in range(rng.randrange(3)):
                step = rng.choice(["label", "review", "comment"])
                if step == "label":
                    pull["labels"].append({"name": rng.choice(["bug", "good first issue", "性能"]), "color": "d73a4a"})
                    tell("pull_request", "labeled", label=pull["labels"][-1])
                elif step == "review":
                    state = rng.choice(["approved", "changes_requested", "commented"])
                    review = {"user": self.someone(), "state": state, "body": self.text(rng.randrange(3, 40))}
                    tell("pull_request_review", "submitted", review=review)
                else:
                    comment = {"user": self.someone(), "path": "src/queue.c", "line": rng.randrange(1, 900)}
                    comment |= {"diff_hunk": "@@ -1,4 +1,6 @@\n-a\n+b", "body": self.text(rng.randrange(5, 60))}
                    tell("pull_request_review_comment", "created", comment=comment)
            before = pull["head"]["sha"]
            pull["head"] = {**pull["head"], "sha": self.sha()}
            pull["commits"] += 1
            pull["additions"] += rng.randrange(1, 80)
            tell("pull_request", "synchronize", before=before, after=pull["head"]["sha"])
        if slow_merge:  # the service has not worked it out yet: the handler has to look a second time
            pull["mergeable"] = None
            tell("pull_request", "ready_for_review")
            pull["mergeable"] = True
        if rng.random() < 0.2:
            pull["state"] = "closed"
            tell("pull_request", "closed")
            pull["state"] = "open"
            tell("pull_request", "reopened")
        if rng.random() < 0.85:
            pull.update(state="closed", merged=rng.random() < 0.8, merge_commit_sha=self.sha())
            tell("pull_request", "closed")

    # Events on their own.

    def push(self, repository: str, when: datetime, commit_count: int) -> None:
        commits = []
        for _ in range(commit_count):
            author = self.random.choice(PEOPLE)
            files = [f"src/part_{self.random.randrange(40)}.c" for _ in range(self.random.randrange(1, 9))]
            message = f"{self.random.choice(TITLES)}\n\n{self.text(self.random.randrange(5, 50))}"
            commits.append(
                {
                    "id": self.sha(),
                    "message": message,
                    "timestamp": stamp(when),
                    "author": {"name": author, "email": f"{author}@example.org", "username": author},
                    "added": files[:1],
                    "modified": files[1:],
                    "removed": [],
                }
            )
        head = commits[-1] if commits else None
        self.add(
            when,
            "push",
            repository,
            ref="refs/heads/main",
            before=self.sha(),
            after=head["id"] if head else "0" * 40,
            deleted=head is None,
            commits=commits,
            head_commit=head,
            pusher={"name": self.random.choice(PEOPLE)},
            sender=self.someone(),
        )

    def check_run(self, repository: str, when: datetime, annotation_count: int) -> None:
        rng = self.random
        places = [(f"src/part_{rng.randrange(40)}.c", rng.randrange(1, 900)) for _ in range(annotation_count)]
        annotations = [
            {
                "path": path,
                "start_line": line,
                "level": self.random.choice(["notice", "warning", "failure"]),
                "message": self.text(12),
                "raw": {"tool": {"name": "lint", "rules": [{"id": f"R{line}", "help": {"text": None, "uri": None}}]}},
            }
            for path, line in places
        ]
        conclusion = self.random.choice(["success", "success", "failure", "neutral", None])
        check = {
            "id": self.random.getrandbits(40),
            "name": self.random.choice(["build (ubuntu, 3.11)", "tests", "lint"]),
            "head_sha": self.sha(),
            "status": "completed" if conclusion else "in_progress",
            "conclusion": conclusion,
            "output": {"title": None, "annotations_count": annotation_count, "annotations": annotations},
            "pull_requests": [],
        }
        self.add(when, "check_run", repository, action="completed" if conclusion else "created", check_run=check)

    def issue(self, repository: str, when: datetime) -> None:
        issue = {
            "number": self.number(repository),
            "title": self.random.choice(TITLES),
            "state": "open",
            "user": self.someone(),
            "body": self.text(self.random.randrange(20, 150)),
            "reactions": {"+1": self.random.randrange(9), "rocket": self.random.randrange(3)},
        }
        self.add(when, "issues", repository, action="opened", issue=issue, sender=issue["user"])
        for _ in range(self.random.randrange(3)):
            when += timedelta(seconds=self.random.randrange(60, 4000))
            comment = {"user": self.someone(), "body": f"> {issue['title']}\n\n{self.text(30)} 👍"}
            self.add(when, "issue_comment", repository, action="created", issue=issue, comment=comment)

    def release(self, repository: str, when: datetime, minor: int) -> None:
        release = {
            "tag_name": f"v1.{minor}.0",
            "name": f"1.{minor} “{self.random.choice(['Hänsel', 'Grete', '桜'])}”",
            "prerelease": False,
            "author": self.someone(),
            "body": "\n".join(f"- {self.random.choice(TITLES)}" for _ in range(self.random.randrange(3, 20))),
            "assets": [{"name": "source.tar.gz", "size": self.random.randrange(10**6), "state": "uploaded"}],
        }
        self.add(when, "release", repository, action="published", release=release, sender=release["author"])

    def ping(self, repository: str) -> None:
        hook = {"type": "Repository", "id": self.random.getrandbits(30), "active": True, "events": ["*"]}
        self.add(START, "ping", repository, zen="Approachable is better than simple.", hook=hook)

    def lines(self) -> list[bytes]:
        """All events in the order of their time, as signed lines."""
        self.events.sort(key=lambda entry: entry[0])
        poison = [place for place, (_, event) in enumerate(self.events) if event["event"] == "push"][-7]
        lines = []
        for place, (when, event) in enumerate(self.events):
            event = {"delivery": self.delivery(), "received_at": stamp(when), **event}
            event["signature"] = signature(event)
            if place == poison:
                event["pusher"] = {"name": "mallory"}  # after it was signed
            lines.append(json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode())
        return lines

    def delivery(self) -> str:
        digits = "".join(self.random.choices(string.hexdigits[:16], k=32))
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def signature(event: Event) -> str:
    """The HMAC of everything but itself, over one agreed way to write it."""
    signed = {name: value for name, value in event.items() if name != "signature"}
    text = json.dumps(signed, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return "sha256=" + hmac.new(SECRET, text.encode(), hashlib.sha256).hexdigest()


def make() -> bytes:
    """Return the whole file."""
    maker = Maker(seed=20)
    rng = maker.random
    day = timedelta(hours=9)
    for repository in REPOSITORIES:
        maker.ping(repository)
        for place in range(6):
            slow_merge = place == 3 and repository.startswith("acme/")
            maker.pull_request_life(repository, START + rng.random() * day, slow_merge=slow_merge)
        for _ in range(8):
            maker.push(repository, START + rng.random() * day, rng.randrange(6))
        for _ in range(5):
            maker.issue(repository, START + rng.random() * day)
        for _ in range(6):
            maker.check_run(repository, START + rng.random() * day, rng.randrange(4))
        for minor in range(rng.randrange(1, 3)):
            maker.release(repository, START + day * (minor + 1) / 3, minor)
        maker.push(repository, START + rng.random() * day, rng.randrange(25, 45))
        maker.check_run(repository, START + rng.random() * day, rng.randrange(50, 110))
    return b"\n".join(maker.lines()) + b"\n"


if __name__ == "__main__":
    (Path(__file__).parent / "webhooks.jsonl").write_bytes(make())
