"""An in-memory NATS server with JetStream, for thousands of agents in one process and for virtual time.

It takes the place of nats-server and of nats-py's connection below `fedbus.bus.bus.Bus`, so that bus, lifecycles, lease
and blobs are the same code as on a real server, and pass the same tests:

    with MemoryServer("fleet") as server:
        async with Bus.connect(server.url, identity) as bus: ...

`server` connects clients and routes messages, `stream` and `consumer` are JetStream, `client`, `subscription` and
`jetstream` are nats-py's classes with other insides. All times are of the event loop. Permissions, accounts, TLS and
clusters have no counterpart here: their tests run on nats-server only.
"""
