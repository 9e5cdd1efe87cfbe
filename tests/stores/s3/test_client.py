"""What the S3 clients of a process share: TLS contexts and service models."""

import os
import shutil
import ssl
from pathlib import Path

import pytest
from botocore.httpsession import get_cert_path

from fedbus.stores.s3.client import _HttpSession, load_service_models


async def tls_context(verify: bool | str = True) -> ssl.SSLContext:
    """Return the TLS context of the connections of a new client."""
    connector = await _HttpSession(verify=verify)._create_connector(None)
    await connector.close()
    context = connector._ssl
    assert isinstance(context, ssl.SSLContext)
    return context


async def test_clients_share_a_tls_context() -> None:
    context = await tls_context()
    assert await tls_context() is context
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


async def test_a_changed_ca_file_is_loaded_again(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    shutil.copy(get_cert_path(True), file)
    before = await tls_context(str(file))
    assert await tls_context(str(file)) is before
    os.utime(file, (1, 1))
    assert await tls_context(str(file)) is not before


async def test_a_client_without_verification_has_its_own_context() -> None:
    context = await tls_context(False)
    assert context.verify_mode is ssl.CERT_NONE
    assert await tls_context(False) is not context
    assert (await tls_context()).verify_mode is ssl.CERT_REQUIRED


def test_service_models_come_from_aws_data_path_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path))
    assert str(tmp_path) in load_service_models.__wrapped__().search_paths
