# SPDX-License-Identifier: BSD-3-Clause
"""The nftables table `inet nbagent` in the kernel: its rules, and the elements of its sets. `rules` has their text.

Every method raises NftFailed when nftables refuses a command, also because another program has deleted the table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from nftables import Nftables

from nbagent.network.rules import COUNTED, FIXED, GUARDED, PER_SLOT, TABLE

# strerror(3) of ENOENT and EEXIST, which nft prints; this process sets no locale.
MISSING, PRESENT = "No such file or directory", "File exists"
# An address for documentation (RFC 5737), which no slot has.
UNUSED = "192.0.2.1"


class NftFailed(OSError):
    """nftables refused a command."""


class Table:
    """The table of this host. Needs CAP_NET_ADMIN."""

    def __init__(self) -> None:
        self._nft = Nftables()
        # A copy of the set `guarded`, to restore it after another program flushed the host's ruleset.
        self.guarded = {name for name, in self._elements(GUARDED)}
        # The table without the elements of slots, as `note_applied` has found it.
        self._applied = ""
        # Whether the deletion of an element of a slot failed, so that `delete_stale` is due.
        self.has_stale = False

    def apply(self, script: str) -> None:
        """Creates or updates the table by a script of `rules.render`, and adds the guarded interfaces."""
        try:
            self._command(script)
        except NftFailed:
            # Another program or version has made a chain or set of the same name and of another kind.
            self._command(f"table {TABLE}\ndelete table {TABLE}\n{script}")
        for name in self.guarded:
            self._add_guarded(name)

    def note_applied(self) -> None:
        """Notes the table as it is, for `is_intact`."""
        self._applied = self._listed()

    def is_intact(self) -> bool:
        """Whether the rules and the elements that are the same for all slots are as `note_applied` has found them."""
        try:
            guarded = {name for name, in self._elements(GUARDED)}
            return self._listed() == self._applied and guarded == self.guarded
        except NftFailed:  # the table or a set of `FIXED` is missing
            return False

    def check(self) -> None:
        """Tries to add an element, as for a slot, and changes nothing."""
        self._nft.set_dry_run(True)
        try:
            self._command(f"add {_element('lo', UNUSED)}")
        finally:
            self._nft.set_dry_run(False)

    def delete(self) -> None:
        """Deletes the table, if it exists."""
        if f"table {TABLE}\n" in self._command("list tables inet"):
            self._command(f"delete table {TABLE}")

    # -- interfaces of the host on which forwarding was enabled ----------------------------------

    def guard(self, name: str) -> None:
        """Adds an interface of the host to those that forward packets of slots only."""
        self.guarded.add(name)
        self._add_guarded(name)

    def unguard(self) -> None:
        """Removes all interfaces from them."""
        for name in self.guarded:
            self._delete_element(GUARDED, name)
        self.guarded.clear()

    # -- slots -----------------------------------------------------------------------------------

    def add_slot(self, name: str, addresses: Iterable[str]) -> None:
        """Adds the addresses of a slot's interface, so that its packets pass."""
        for address in addresses:
            self._command(f"add {_element(name, address)}")

    def restore_address(self, name: str, address: str) -> bool:
        """Adds an address of a slot's interface; returns whether it was missing."""
        try:
            self._command(f"create {_element(name, address)}")
        except NftFailed as error:
            if PRESENT in str(error):
                return False
            raise
        return True

    def delete_slot(self, name: str, addresses: Iterable[str]) -> None:
        """Deletes the elements of a slot's interface; any of them may be missing."""
        for address in addresses:
            self._delete_element(_set_of(address), name, address)
        for set_name in COUNTED:
            self._delete_element(set_name, name)

    def delete_others(self, keep: Iterable[str]) -> None:
        """Deletes the elements of all interfaces of slots but these."""
        kept = set(keep)
        for set_name in PER_SLOT:
            for element in self._elements(set_name):
                if element[0] not in kept:
                    self._delete_element(set_name, *element)

    def delete_stale(self, existing: Iterable[str]) -> set[str]:
        """Deletes the elements of interfaces that are not among `existing`; returns their names. Raises NftFailed."""
        known, found = set(existing), set()
        self.has_stale = False
        for set_name in PER_SLOT:
            for element in self._elements(set_name):
                if element[0] not in known:
                    self._delete_element(set_name, *element)
                    found.add(element[0])
        if self.has_stale:
            raise NftFailed(f"elements of {', '.join(sorted(found)[:3])} were not deleted")
        return found

    # -- helpers ---------------------------------------------------------------------------------

    def _listed(self) -> str:
        """The table without elements, and the elements of the sets that are the same for all slots."""
        self._nft.set_stateless_output(True)
        self._nft.set_terse_output(True)
        try:
            found = [self._command(f"list table {TABLE}")]
            self._nft.set_terse_output(False)
            found += [self._command(f"list set {TABLE} {name}") for name in FIXED]
            # As a comment, nftables after 1.1.3 prints the number of elements of a set.
            return re.sub(r"\s*# count \d+", "", "".join(found))
        finally:
            self._nft.set_terse_output(False)
            self._nft.set_stateless_output(False)

    def _add_guarded(self, name: str) -> None:
        self._command(f'add element {TABLE} {GUARDED} {{ "{name}" }}')

    def _delete_element(self, set_name: str, name: str, *rest: str) -> None:
        """Deletes an element of a set, if there is one. Sets `has_stale` when that fails."""
        key = " . ".join((f'"{name}"', *rest))
        try:
            self._command(f"delete element {TABLE} {set_name} {{ {key} }}")
        except NftFailed as error:
            self.has_stale = self.has_stale or MISSING not in str(error)

    def _elements(self, set_name: str) -> list[tuple[str, ...]]:
        """The elements of a set, each as the tuple of its concatenated fields; none if the set is missing."""
        self._nft.set_json_output(True)
        try:
            response = json.loads(self._command(f"list set {TABLE} {set_name}"))
        except NftFailed as error:
            if MISSING in str(error):
                return []
            raise
        finally:
            self._nft.set_json_output(False)
        found = []
        for part in response["nftables"]:
            for element in part.get("set", {}).get("elem", ()):
                # {"elem": {"val": …}} with a counter or limit; {"concat": […]} with several fields.
                value = element.get("elem", element) if isinstance(element, dict) else element
                value = value.get("val", value) if isinstance(value, dict) else value
                found.append(tuple(value["concat"]) if isinstance(value, dict) else (str(value),))
        return found

    def _command(self, script: str) -> str:
        status, output, error = self._nft.cmd(script)
        if status:
            # The message and the command; a longer script has one of each for every line.
            raise NftFailed(f"nft: {' '.join(str(error).splitlines()[:2])[:300]}")
        return str(output)


def _set_of(address: str) -> str:
    return "slots6" if ":" in address else "slots4"


def _element(name: str, address: str) -> str:
    """The element of a slot's address, in nft's words."""
    return f'element {TABLE} {_set_of(address)} {{ "{name}" . {address} }}'
