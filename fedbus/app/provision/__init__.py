"""Members of a federation and their credentials: keys, JWTs, certificates and kits.

    federation          the folder with all keys; all changes of members go through it
    registry            the members and revocations, which are not secret
    keys                NATS NKeys (ed25519), in files of mode 600
    jwt_claims          operator, account and user claims, as decentralised JWTs of NATS
    certificates        the certificate authority (CA) and server certificates
    nats_config         the configuration of nats-server and of a leaf node
    kit                 the files for a device or user: credentials, CA, settings, trusted keys
    credential_checks   the checks of `fedbus doctor`

`fedbus.bus.account_admin` sends changes to the running nats-server. Secrets are stored in files of mode 600 only;
they are never printed, logged or published.
"""
