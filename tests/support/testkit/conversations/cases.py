"""All of them, in the order of the template matrix."""

from __future__ import annotations

from testkit.conversations.asked import ASKED
from testkit.conversations.building import Conversation
from testkit.conversations.forms import FORMS
from testkit.conversations.ugly import UGLY

CONVERSATIONS: tuple[Conversation, ...] = (*FORMS, *UGLY, *ASKED)


PLAIN = ("one_turn", "many_turns")


BY_NAME = {conversation.name: conversation for conversation in CONVERSATIONS}
