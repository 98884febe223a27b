"""A Flower Grid in this process, for tests that need no Ray: one Context a node, kept here."""

from __future__ import annotations

from flwr.app import Context, Error, RecordDict
from flwr.serverapp import Grid


class LocalGrid(Grid):
    """Hands messages to one client app; nodes have large numbers, as Flower's have.

    Parameters
    ----------
    client_app : ClientApp
    nodes : int
    partition_ids : list or None
        Of each node; None: nodes have none.
    lost : set of int
        Positions of nodes that never answer a train message.
    """

    def __init__(self, client_app, nodes, partition_ids="own", lost=()):
        self.client_app, self.lost = client_app, set(lost)
        ids = range(nodes) if partition_ids == "own" else partition_ids
        self.contexts = {}
        self.sent = []
        for position in range(nodes):
            node = 10**15 + 7919 * (nodes - position)  # not in the order of the clients
            config = {} if ids is None else {"partition-id": ids[position]}
            self.contexts[node] = Context(1, node, config, RecordDict(), {})
        _set_identity()

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.sent.append(message)
            position = list(self.contexts).index(node)
            if message.metadata.message_type == "train" and position in self.lost:
                continue
            replies.append(self._answer(message, self.contexts[node]))
        return replies[::-1]  # whoever answers first

    def _answer(self, message, context):
        from flwr.app import Message

        try:
            return self.client_app(message, context)
        except Exception as error:
            return Message(Error(code=0, reason=str(error)), reply_to=message)

    # what the base class asks for, and no app of these tests uses
    def set_run(self, run):
        raise AssertionError

    @property
    def run(self):
        raise AssertionError

    def create_message(self, *args, **kwargs):
        raise AssertionError

    def push_messages(self, messages):
        raise AssertionError

    def pull_messages(self, message_ids):
        raise AssertionError


def _set_identity():
    """Say who sends; Flower has wanted this since 1.41."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def serve(server_app, grid, **run_config):
    """Run a server app on a grid and give its Context."""
    context = Context(1, 0, {}, RecordDict(), run_config)
    server_app(grid, context)
    return context
