"""A worker whose servers ask for tokens, which expire while it works."""

from __future__ import annotations

import pytest
import requests

from producer import Courier
from producer.errors import PacsUnauthorized
from sandbox.synthetic import image, new_uid
from sandbox.tokens import ENTRA_SCOPE

WAIT_S = 30
SECRET = "courier-secret"
ENDPOINTS = {
    "msdicom": "entra/5f3c0a52-0000-4000-8000-000000000000/oauth2/v2.0/token",
    "dcm4chee": "keycloak/realms/dcm4che/protocol/openid-connect/token",
}


def with_tokens(sandbox):
    """Both servers behind their token endpoints; every call needs a good token."""
    servers = sandbox.servers()
    for server in servers:
        server["auth"] = {
            "type": "oauth2",
            "token_url": f"{sandbox.control}/{ENDPOINTS[server['name']]}",
            "client_id": "courier",
            "client_secret_env": "WARD_SECRET",
            **({"scope": ENTRA_SCOPE} if server["name"] == "msdicom" else {}),
        }
        sandbox.set_fault(server["name"], "*", bearer=True)
    return servers


@pytest.mark.parametrize("name", list(ENDPOINTS))
def test_an_upload_gets_through_although_its_token_expires_between_question_and_push(
    worker, sandbox, image_server, redis, name
):
    running = worker(servers=with_tokens(sandbox), environ={"WARD_SECRET": SECRET})
    with Courier(running.settings) as courier:
        first = courier.upload(image_server.put("first.dcm", image(new_uid())), server=name)
        assert first.result(timeout_s=WAIT_S)["server_name"] == name
        try:
            # What the worker holds looks fresh to it, and is dead by the servers' clock.
            requests.put(f"{sandbox.control}/clock", json={"ahead_s": 400}, timeout=10)
            second = courier.upload(image_server.put("second.dcm", image(new_uid())), server=name)
            assert second.result(timeout_s=WAIT_S)["attempts"] == 1
            # Good for the questions of the third job, and no longer for its push.
            sandbox.set_fault(name, "store", unauthorized=True)
            third = courier.upload(image_server.put("third.dcm", image(new_uid())), server=name)
            payload = third.result(timeout_s=WAIT_S)
        finally:
            requests.put(f"{sandbox.control}/clock", json={"ahead_s": 0}, timeout=10)
        assert (payload["status"], payload["attempts"]) == ("stored", 1)
        records = str([courier.ledger.read_record(handle.id) for handle in (first, second, third)])
    assert SECRET not in running.log + records
    assert "Bearer" not in running.log + records


def test_a_wrong_secret_ends_the_job_as_a_dead_letter_that_says_what_to_check(worker, sandbox, image_server):
    """After it has waited for the credential to be accepted."""
    running = worker(servers=with_tokens(sandbox), jobs={"max_wait_s": 2}, environ={"WARD_SECRET": "wrong-3e7"})
    with Courier(running.settings) as courier:
        handle = courier.upload(image_server.put("a.dcm", image(new_uid())))
        with pytest.raises(PacsUnauthorized, match=r"token endpoint of .* check client_id, client_secret and scope"):
            handle.result(timeout_s=WAIT_S)
        assert [letter.job_id for letter in courier.dead.list()] == [handle.id]
    assert "wrong-3e7" not in running.log
