"""Who belongs to a federation, and how they prove it: keys, claims, certificates and kits.

    federation   the folder that holds it all: who was let in, who was put out; every change goes through it
    keys         ed25519 keys in NATS's own spelling, in files that only their owner reads
    claims       what is signed: operator, account, user, as NATS decentralised JWTs
    certificates the certificate authority of the federation and what it signs
    server       the nats-server's configuration, and that of a leaf node at a site
    kit          what a device is given: credentials, authority, settings, whom to trust
    checkup      what is wrong with a kit, in words

The broker is told of a change while it runs: see `fedbus.bus.account_admin`. Nothing secret is
printed, logged or said on the bus; secrets are in files of mode 600, and nowhere else.
"""
