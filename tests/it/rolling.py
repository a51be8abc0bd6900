"""Asks checks of all replicas in turn, as a service with client-side balancing does, until its input ends."""

import sys
import threading
from collections import Counter

import grpc
from hallpass.v1 import permission_service_pb2 as permissions, permission_service_pb2_grpc as permissions_rpc

targets, organization, user, permission = sys.argv[1:]
# A list of addresses is no authority that HTTP/2 knows; a name of DNS would be one.
options = [("grpc.lb_policy_name", "round_robin"), ("grpc.default_authority", "hallpass")]
channel = grpc.insecure_channel(f"ipv4:{targets}", options)
stub = permissions_rpc.PermissionServiceStub(channel)
question = permissions.CheckPermissionRequest(organization_id=organization, user_id=user, permission=permission)
stopping = threading.Event()
outcomes = Counter()


def ask():
    while not stopping.is_set():
        try:
            answer = stub.CheckPermission(question, timeout=5)
            outcomes["allow" if answer.allowed else "deny"] += 1
        except grpc.RpcError as error:
            outcomes[f"{error.code().name}: {error.details()}"] += 1


threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads:
    thread.start()
for line in sys.stdin:
    print(sum(outcomes.values()), flush=True)
stopping.set()
for thread in threads:
    thread.join()
print(dict(outcomes))
