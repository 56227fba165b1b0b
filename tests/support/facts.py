"""Facts about ranks, as the preflight check gathers them."""


def facts_of(**values):
    """As `host_facts` has them, of a rank for which all is well."""
    return {"host": "a", "settings": {}, "cores": [0, 1], "threads": 1, "addresses": [("eth0", "10.0.0.1")],
            "shared_memory": 2**30, "device": "cpu"} | values
