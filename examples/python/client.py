"""Checks and lists permissions, and follows the audit log, over gRPC."""

import argparse
import os
import sys
import time
from urllib.parse import urlsplit

import grpc
from hallpass.v1 import audit_service_pb2 as audit, audit_service_pb2_grpc as audit_rpc
from hallpass.v1 import permission_service_pb2 as permissions, permission_service_pb2_grpc as permissions_rpc

ENDPOINT = urlsplit(os.environ.get("HALLPASS_ENDPOINT", "http://127.0.0.1:50051"))
TOKEN = os.environ.get("HALLPASS_TOKEN")
METADATA = [("authorization", f"Bearer {TOKEN}")] if TOKEN else []
DEADLINE_SECONDS = 5
OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),  # an audit entry can be larger than the 4 MiB of the default
    ("grpc.keepalive_time_ms", 30_000),  # who waits for the next change must notice a connection that is gone
]


def connect():
    if ENDPOINT.scheme == "https":
        return grpc.secure_channel(ENDPOINT.netloc, grpc.ssl_channel_credentials(), OPTIONS)
    return grpc.insecure_channel(ENDPOINT.netloc, OPTIONS)


def verdict(answer):
    return f"{'allow' if answer.allowed else 'deny'} {permissions.Reason.Name(answer.reason)}"


def check(organization, user, permission):
    request = permissions.CheckPermissionRequest(organization_id=organization, user_id=user, permission=permission)
    with connect() as channel:
        stub = permissions_rpc.PermissionServiceStub(channel)
        answer = stub.CheckPermission(request, timeout=DEADLINE_SECONDS, metadata=METADATA)
    print(verdict(answer))
    return 0 if answer.allowed else 1


def list_(organization, user):
    request = permissions.ListUserPermissionsRequest(organization_id=organization, user_id=user)
    with connect() as channel:
        stub = permissions_rpc.PermissionServiceStub(channel)
        answer = stub.ListUserPermissions(request, timeout=DEADLINE_SECONDS, metadata=METADATA)
    for permission in answer.permissions:
        print(verdict(permission), permission.permission)


def follow(cursor_file):
    """Prints each change once. A crash between printing and keeping repeats a few: drop those whose `id` you have."""
    while True:
        cursor = open(cursor_file).read() if os.path.exists(cursor_file) else ""
        start = {"cursor": cursor} if cursor else {"earliest": True}
        try:
            with connect() as channel:
                stub = audit_rpc.AuditServiceStub(channel)
                for event in stub.StreamAuditEntries(audit.StreamAuditEntriesRequest(**start), metadata=METADATA):
                    entries = event.entries.entries
                    for entry in entries:
                        change = audit.ChangeType.Name(entry.change_type)
                        print(entry.cursor, change, entry.table, entry.organization_id, entry.after, flush=True)
                    if event.HasField("gap"):
                        print("removed before it was read:", event.gap, file=sys.stderr)
                    keep(cursor_file, entries[-1].cursor if entries else event.checkpoint.cursor or event.gap.to)
        except grpc.RpcError as error:
            # A stream ends when the service does, and now and then. DATA_LOSS above all is another matter: somebody
            # must decide where to begin.
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
                raise
            time.sleep(1)


def keep(path, cursor):
    """The whole cursor or the one before, whatever happens meanwhile."""
    with open(f"{path}.new", "w") as file:
        file.write(cursor)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    takes = {check: ["organization", "user", "permission"], list_: ["organization", "user"], follow: ["cursor_file"]}
    for command, names in takes.items():
        arguments = commands.add_parser(command.__name__.rstrip("_"))
        arguments.set_defaults(command=command)
        for name in names:
            arguments.add_argument(name)
    arguments = vars(parser.parse_args())
    try:
        return arguments.pop("command")(**arguments)
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
