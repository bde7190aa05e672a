"""Hostile snapshots and files of weights: refused in one line, and nothing in them runs."""

import builtins
import contextlib
import copyreg
import io
import os
import pickle
import pickletools
import struct
import sys
import zipfile

import pytest
import torch

from fastflow.errors import CheckpointError
from fastflow.safe_pickle import Limits, RefusedPickle, read_pickle
from fastflow.snapshot import _snapshot_names, read_snapshot, read_state_dict
from snapshot_files import (
    VERSION,
    dumps,
    edm2_network,
    edm_network,
    module,
    official_modules,
    thing,
    write_edm,
)

COMMAND = "touch canary"
CODE = "open('canary', 'w').close()"

# --- what pickles are made of -----------------------------------------------------------------


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def raw(data):
    return b"B" + struct.pack("<I", len(data)) + data


def number(value):
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(9 if value >= 2**63 else 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def name(path):
    place, attribute = path.split(":")
    return f"c{place}\n{attribute}\n".encode()


def stacked(path):
    place, attribute = path.split(":")
    return text(place) + text(attribute) + b"\x93"


def called(path, *arguments, spelled=name):
    return spelled(path) + b"(" + b"".join(arguments) + b"tR"


def entries(**values):
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


NOTHING = called("collections:OrderedDict")
HONEST = dumps(edm_network())[2:-1]


def beside(evil):
    """An honest snapshot with one entry more."""
    return b"\x80\x04" + entries(ema=HONEST, x=evil) + b"."


def persistent(state=b"}", class_name=None, **changes):
    meta = {"type": text("class"), "version": number(VERSION), "module_src": text("pass")}
    meta |= {"class_name": class_name or text("Net"), "state": state} | changes
    return called("torch_utils.persistence:_reconstruct_persistent_obj", entries(**meta))


MACHINE = {"short": 2, "int": 4, "long": 4}
INFO = {"protocol_version": 1001, "little_endian": True, "type_sizes": MACHINE}


def stored(
    info=None,
    reference=None,
    kind="torch:FloatStorage",
    count=4,
    keys=("key",),
    written=None,
    data=bytes(16),
    header=None,
    whole=None,
    after=b"",
):
    """The file of a storage in a snapshot, with parts of it changed."""
    if header is None:
        header = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03."
    if reference is None:
        reference = b"(" + text("storage") + name(kind) + text("key") + text("cpu")
        reference += number(count) + b"NtQ"
    if whole is None:
        whole = b"\x80\x02" + reference + b"."
    facts = pickle.dumps(INFO if info is None else info, protocol=2)
    end = struct.pack("<q", count if written is None else written) + data + after
    return header + facts + whole + pickle.dumps(list(keys), protocol=2) + end


def storage(**changes):
    return called("torch.storage:_load_from_bytes", raw(stored(**changes)))


def tensor(
    offset=0, size=(4,), stride=(1,), hooks=NOTHING, memory=None, grad=b"\x89", more=b"", **changes
):
    memory = storage(**changes) if memory is None else memory
    sizes = (size if isinstance(size, bytes) else numbers(size)), numbers(stride)
    return called(
        "torch._utils:_rebuild_tensor_v2", memory, number(offset), *sizes, grad, hooks, more
    )


def parameter(value, hooks=NOTHING):
    return called("torch._utils:_rebuild_parameter", value, b"\x88", hooks)


def network(**state):
    return b"\x80\x04" + entries(ema=persistent(entries(**state))) + b"."


def dtype(code="f4", order="<"):
    made = called("numpy:dtype", text(code), b"\x89", b"\x88")
    return made + b"(" + number(3) + text(order) + b"NNN" + numbers([-1, -1, 0])[1:-1] + b"tb"


def array(shape=(2,), kind=None, contents=None, column_major=b"\x89"):
    made = called(
        "numpy.core.multiarray:_reconstruct", name("numpy:ndarray"), numbers([0]), b"C\x01b"
    )
    contents = raw(bytes(8)) if contents is None else contents
    return (
        made
        + b"("
        + number(1)
        + numbers(shape)
        + (kind or dtype())
        + column_major
        + (contents + b"tb")
    )


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


SYSTEM = Calls(os.system, COMMAND)


def built_with(argument):
    made = thing("Net", {})
    made._init_args = ([1, argument],)
    return made


# --- names ------------------------------------------------------------------------------------

_COMMANDS = """
    os:system posix:system nt:system os:popen os:execvp pty:spawn subprocess:Popen subprocess:call
    subprocess:check_output commands:getoutput platform:popen
"""
_CODES = """
    builtins:eval builtins:exec builtins:compile __builtin__:eval __builtin__:execfile
    builtins:breakpoint timeit:timeit cProfile:run pdb:run code:interact runpy:run_path
    numpy.testing._private.utils:runstring numpy.f2py.crackfortran:myeval numpy.f2py.capi_maps:eval
    torch.jit:CompilationUnit torch.fx.graph_module:exec
"""
_OTHERS = """
    builtins:getattr builtins:setattr builtins:__import__ builtins:open builtins:globals
    builtins:type builtins:object builtins:bytearray builtins:dict builtins:print
    importlib:import_module pickle:loads _pickle:loads marshal:loads types:FunctionType
    types:CodeType ctypes:CDLL shutil:rmtree webbrowser:open socket:create_connection
    functools:partial functools:reduce operator:attrgetter operator:methodcaller operator:itemgetter
    itertools:starmap copyreg:_reconstructor copyreg:__newobj__ collections:namedtuple
    collections:OrderedDict.fromkeys collections:defaultdict collections:Counter
    collections:OrderedDict.__reduce__ collections.OrderedDict:__class__ argparse:Namespace
    _codecs:decode codecs:encode codecs:open torch:load torch:save torch.hub:load
    torch.hub:load_state_dict_from_url torch.jit:load torch.serialization:load
    torch.storage:torch.load torch.storage:io.open torch.storage:TypedStorage
    torch.storage:_load_from_bytes.__globals__ torch._utils:_import_dotted_name
    torch._utils:_rebuild_tensor torch._tensor:_rebuild_from_type_v2
    torch._utils:_rebuild_wrapper_subclass torch.nn.modules.module:torch.os.system
    torch.nn.modules.module:functools.partial torch.nn.modules.module:torch
    torch.nn.modules.linear:Linear.__init__ torch.nn.modules.module:Module.apply
    torch.nn.modules:Linear torch.nn:Linear torch.nn.modules.module.os:System
    torch.nn.modules..os:System torch.nn.functional:silu torch.nn.modules.utils:_ntuple
    torch:FloatStorage torch:Tensor torch:float32 torch.utils.data:DataLoader
    torch.utils.cpp_extension:load_inline torch:_C numpy:load numpy:loads numpy:fromfile
    numpy:memmap numpy.core.multiarray:fromfile numpy.lib.npyio:load numpy:ndarray.tofile
    numpy.core.multiarray:scalar.__call__ dnnlib.util:call_func_by_name
    dnnlib.util:construct_class_by_name dnnlib.util:open_url dnnlib:EasyDict
    dnnlib.util:EasyDict.__init__ torch_utils.persistence:import_hook
    torch_utils.persistence:_src_to_module torch_utils.persistence:persistent_class
"""
PATHS = {
    **dict.fromkeys(_COMMANDS.split(), COMMAND),
    **dict.fromkeys(_CODES.split(), CODE),
    **dict.fromkeys(_OTHERS.split(), "os"),
}


# --- everything else --------------------------------------------------------------------------


def deep_modules(count):
    """Modules in modules, `count` deep."""
    inner = b"}" + text("_modules") + b"}" + text("0")
    return (
        (b"ctorch.nn.modules.container\nSequential\n)\x81" + inner) * count + b"N" + b"ssb" * count
    )


def shared(wrap, value, levels=40):
    """A value that holds the one before it several times, level upon level."""
    for _ in range(levels):
        value = wrap(value)
    return dumps({"x": value})


LAST = b"q\xf0"
AGAIN = b"h\xf0"

HOSTILE = {
    # Calls through Python's own pickler, wherever an honest snapshot has a value.
    **{
        f"os.system as an entry, protocol {p}": (
            dumps({"ema": edm2_network(), "x": SYSTEM}, p),
            r"asks to load 'posix\.system'|operation",
        )
        for p in (0, 1, 2, 3, 4, 5)
    },
    "os.system as the network": (dumps({"ema": SYSTEM}), "asks to load"),
    "os.system as the snapshot": (dumps(SYSTEM), "asks to load"),
    "os.system in an attribute": (dumps({"ema": module("N", attributes={"a": SYSTEM})}), "asks"),
    "os.system deep in a list": (dumps({"ema": None, "x": [[(SYSTEM,)]]}), "asks to load"),
    "os.system as a construction argument": (dumps({"ema": built_with(SYSTEM)}), "asks to load"),
    "eval in the loss": (dumps({"loss_fn": thing("L", {"P": Calls(eval, CODE)})}), "asks to load"),
    "a function of ours": (beside(called("fastflow.snapshot:read_state_dict", text("x"))), "asks"),
    # Other operations that make or call something.
    "INST": (beside(b"(" + text(COMMAND) + b"ios\nsystem\n"), "operation INST"),
    "INST without arguments": (beside(b"(ios\nabort\n"), "operation INST"),
    "OBJ": (beside(b"(cos\nsystem\n" + text(COMMAND) + b"o"), r"asks to load 'os\.system'"),
    "OBJ of a known name": (beside(b"(" + name("dnnlib.util:EasyDict") + b"o"), "operation OBJ"),
    "NEWOBJ": (beside(name("subprocess:Popen") + text(COMMAND) + b"\x85\x81"), "asks to load"),
    "NEWOBJ of a known name": (
        beside(name("dnnlib.util:EasyDict") + text("a") + b"\x85\x81"),
        "with arguments",
    ),
    "NEWOBJ_EX": (beside(name("dnnlib.util:EasyDict") + b")}\x92"), "operation NEWOBJ_EX"),
    "EXT1": (beside(b"\x82\xf0" + text(COMMAND) + b"\x85R"), "operation EXT1"),
    "EXT2": (beside(b"\x83\xf0\x00" + text(COMMAND) + b"\x85R"), "operation EXT2"),
    "EXT4": (beside(b"\x84\xf0\x00\x00\x00" + text(COMMAND) + b"\x85R"), "operation EXT4"),
    "PERSID": (beside(b"Pcanary\n"), "operation PERSID"),
    "BINPERSID": (beside(text("canary") + b"Q"), "operation BINPERSID"),
    "a call of a text": (beside(text("os.system") + text(COMMAND) + b"\x85R"), "is no name"),
    "a call of a number": (beside(b"K\x01)R"), "is no name"),
    "a call of an object": (beside(persistent() + b")R"), "is no name"),
    "a call without a tuple": (beside(name("dnnlib.util:EasyDict") + b"]R"), "is no name"),
    # Names that are known, used for something else.
    "OrderedDict of entries": (beside(called("collections:OrderedDict", b"]")), "with arguments"),
    "EasyDict of entries": (beside(called("dnnlib.util:EasyDict", b"}")), "with arguments"),
    "a layer that is constructed": (
        beside(called("torch.nn.modules.linear:Linear", number(10**9), number(10**9))),
        "with arguments",
    ),
    "a layer without state": (beside(called("torch.nn.modules.linear:Linear")), "without contents"),
    "numpy.ndarray called": (beside(called("numpy:ndarray", numbers([1 << 40]))), "a call that"),
    "a name as a value": (beside(name("torch.storage:_load_from_bytes")), "a Name where data"),
    "encoding in a codec of choice": (
        beside(called("_codecs:encode", text("a"), text("zlib_codec"))),
        "encoded otherwise",
    ),
    "encoding without a codec": (beside(called("_codecs:encode", text("a"))), "encoded otherwise"),
    "a set of a text": (beside(called("builtins:set", text("abc"))), "is no list"),
    "a set of numbers": (beside(called("builtins:set", b"]K\x01a")), "int for a text"),
    "set members that are lists": (beside(b"\x8f(]\x90"), "not text"),
    # States set on what should have none.
    "BUILD on a name": (beside(name("torch.storage:_load_from_bytes") + b"}b"), "takes none"),
    "BUILD __code__ on a name": (
        beside(name("_codecs:encode") + entries(__code__=b"N") + b"b"),
        "takes none",
    ),
    "BUILD on a class": (beside(name("torch.nn.modules.linear:Linear") + b"}b"), "takes none"),
    "BUILD on an EasyDict": (
        beside(called("dnnlib.util:EasyDict") + entries(__class__=b"N") + b"b"),
        "takes none",
    ),
    "BUILD on an OrderedDict": (beside(NOTHING + entries(items=b"N") + b"b"), "takes none"),
    "BUILD on a tensor": (beside(tensor() + b"(" + storage() + b"K\x00tb"), "takes none"),
    "BUILD on a list": (beside(b"]}b"), "takes none"),
    "BUILD on a persistent object": (beside(persistent() + b"}b"), "a second state"),
    "BUILD twice on a module": (
        beside(called("torch.nn.modules.linear:Linear") + b"}b}b"),
        "a second state",
    ),
    "BUILD with slots": (
        beside(called("torch.nn.modules.linear:Linear") + b"N" + entries(a=b"N") + b"\x86b"),
        "no dict of names",
    ),
    # The records of persistent objects.
    "a persistent function": (beside(persistent(type=text("function"))), "is no class"),
    "a persistent object of two": (
        beside(called("torch_utils.persistence:_reconstruct_persistent_obj", b"}", b"}")),
        "arguments of a persistent",
    ),
    "a persistent object of a list": (
        beside(called("torch_utils.persistence:_reconstruct_persistent_obj", b"]")),
        "no dict of names",
    ),
    "a class name that is no text": (beside(persistent(class_name=b"]")), "list for a text"),
    "a class name of lines": (beside(persistent(class_name=text("a\nb"))), r"class 'a\\nb' with"),
    "a class name of a megabyte": (beside(persistent(class_name=text("-" * 10**6))), r"-\.\.\.'"),
    "source code that is no text": (
        beside(persistent(module_src=name("os:system"))),
        "asks to load",
    ),
    "a state that is a list": (beside(persistent(b"]")), "no dict of names"),
    "a state with number keys": (beside(persistent(b"}K\x01Ns")), "dict keys that are not text"),
    "a state with byte keys": (beside(persistent(b"}C\x01aNs")), "no dict of names"),
    "a state with keys of lists": (beside(persistent(b"}]Ns")), "dict keys that are not text"),
    "forward hooks": (network(_forward_hooks=entries(a=text("os.system"))), "functions in '_forw"),
    "load hooks": (network(_load_state_dict_pre_hooks=b"]K\x01a"), "functions in '_load_state"),
    "a hook that is a name": (
        network(_backward_hooks=entries(a=name("dnnlib.util:EasyDict"))),
        "functions in '_backward_hooks'",
    ),
    "parameters that are text": (network(_parameters=entries(a=text("b"))), "'a' in Net is no Ten"),
    "parameters in a list": (network(_parameters=b"]Na"), "_parameters of Net is no dict"),
    "modules that are tensors": (network(_modules=entries(a=tensor())), "is no SnapshotModule"),
    "a dropped set that is a list": (network(_non_persistent_buffers_set=b"]"), "damaged state"),
    "names with dots": (network(_parameters=entries(**{"a.b": tensor()})), "have a dot"),
    "an empty name": (network(_parameters=entries(**{"": tensor()})), "have a dot"),
    "a name that occurs twice": (
        network(_parameters=entries(a=tensor()), _buffers=entries(a=tensor())),
        "occur twice",
    ),
    # Tensors.
    "out of bounds by size": (beside(tensor(size=(5,))), "reaches outside its 4"),
    "out of bounds by offset": (beside(tensor(offset=1)), "reaches outside its 4"),
    "out of bounds by stride": (beside(tensor(stride=(2,))), "reaches outside its 4"),
    "out of bounds by two dimensions": (beside(tensor(size=(2, 2), stride=(3, 1))), "outside"),
    "out of bounds of an empty storage": (
        beside(tensor(size=(), stride=(), count=0, data=b"")),
        "outside its 0",
    ),
    "a huge offset": (beside(tensor(offset=2**62, size=(1,))), "outside"),
    "negative offset": (beside(tensor(offset=-1, size=(1,))), "negative or unequal"),
    "negative size": (beside(tensor(size=(-1,))), "negative or unequal"),
    "negative stride": (beside(tensor(offset=3, stride=(-1,))), "negative or unequal"),
    "sizes and strides of different length": (beside(tensor(stride=(1, 1))), "unequal"),
    "stride 0 expansion": (beside(tensor(size=(10**12,), stride=(0,))), "outside"),
    "overlapping windows": (beside(tensor(size=(3, 2), stride=(1, 1))), "outside"),
    "an absurd product of sizes": (beside(tensor(size=(2**62, 2**62), stride=(0, 0))), "outside"),
    "an empty tensor of absurd sizes": (beside(tensor(size=(0, 2**62), stride=(1, 1))), "outside"),
    "an offset beyond 64 bits": (beside(tensor(offset=2**63)), "integer of 9 bytes"),
    "a hundred dimensions": (beside(tensor(size=(1,) * 99, stride=(1,) * 99)), "unequal"),
    "sizes that are texts": (beside(tensor(size=b"(" + text("4") + b"t")), "str for a number"),
    "sizes that are truths": (beside(tensor(size=b"(\x88t", stride=(1,))), "bool for a number"),
    "sizes in a list": (beside(tensor(size=b"]")), "damaged tensor"),
    "a tensor of bytes": (beside(tensor(memory=raw(bytes(16)))), "damaged tensor"),
    "a tensor of a tensor": (beside(tensor(memory=tensor())), "damaged tensor"),
    "a tensor with hooks": (beside(tensor(hooks=entries(a=b"N"))), "hooks or of a special kind"),
    "a tensor with metadata": (beside(tensor(more=entries(conj=b"\x88"))), "special kind"),
    "a gradient that is a number": (beside(tensor(grad=b"K\x01")), "special kind"),
    "too many arguments": (beside(tensor(more=b"NNN")), "special kind"),
    "a parameter of a text": (beside(parameter(text("a"))), "parameter that is no tensor"),
    "a parameter with hooks": (beside(parameter(tensor(), hooks=entries(a=b"N"))), "has hooks"),
    # Storages, which are pickles in the pickle.
    "os.system in a storage": (
        beside(storage(whole=b"\x80\x02" + called("os:system", text(COMMAND)) + b".")),
        r"asks to load 'os\.system'",
    ),
    "os.system in the facts of a storage": (beside(storage(info=SYSTEM)), "asks to load"),
    "os.system in the keys of a storage": (beside(storage(keys=[SYSTEM])), "asks to load"),
    "os.system instead of the magic number": (
        beside(storage(header=pickle.dumps(SYSTEM, protocol=2))),
        "magic number",
    ),
    "os.system in the reference": (
        beside(storage(reference=called("os:system", text(COMMAND)) + b"Q")),
        "asks to load",
    ),
    "a module in a storage": (
        beside(
            storage(
                reference=b"(" + text("module") + name("torch.nn.modules.linear:Linear") + b"NNtQ"
            )
        ),
        "asks to load",
    ),
    "a storage in a storage": (beside(storage(whole=b"\x80\x02" + storage() + b".")), "asks"),
    "a storage of another version": (
        beside(storage(header=stored()[:18] + b"\xea\x03.")),
        "magic number or version",
    ),
    "a storage of a big-endian machine": (
        beside(storage(info=INFO | {"little_endian": False})),
        "kind of machine",
    ),
    "a storage of an odd machine": (
        beside(storage(info=INFO | {"type_sizes": MACHINE | {"int": 3}})),
        "kind of machine",
    ),
    "a storage without facts": (beside(storage(info={})), "kind of machine"),
    "a storage of quantised numbers": (beside(storage(kind="torch:QInt8Storage")), "asks to load"),
    "a storage of any bytes": (
        beside(storage(kind="torch.storage:UntypedStorage")),
        "asks to load",
    ),
    "a reference by number": (beside(storage(reference=b"K\x01Q")), "damaged storage .reference"),
    "a reference by text": (beside(storage(reference=b"Pkey\n")), "operation PERSID"),
    "a reference in a list": (beside(storage(whole=b"\x80\x02](K\x01Qe.")), "reference"),
    "a storage that is a view": (
        beside(
            storage(
                reference=b"("
                + (text("storage") + name("torch:FloatStorage") + text("key") + text("cpu"))
                + number(4)
                + b"("
                + text("other")
                + b"K\x00K\x04ttQ"
            )
        ),
        "reference",
    ),
    "another key than the storage's": (beside(storage(keys=["other"])), "list of storages"),
    "a storage twice": (beside(storage(keys=["key", "key"])), "list of storages"),
    "no storages": (beside(storage(keys=[])), "list of storages"),
    "more elements than bytes": (beside(storage(count=5)), "5 elements of torch.float32 in 24"),
    "fewer elements than bytes": (beside(storage(count=3)), "3 elements"),
    "two counts of elements": (beside(storage(written=3)), "4 elements"),
    "a terabyte of elements": (beside(storage(count=1 << 38)), "274877906944 elements"),
    "a negative count": (beside(storage(count=-4)), "-4 elements"),
    "a count that overflows": (beside(storage(count=(1 << 62) + 4, written=4)), "elements"),
    "bytes after a storage": (beside(storage(after=b"x")), "4 elements"),
    "a cut storage": (beside(storage(data=bytes(15))), "4 elements"),
    "a storage without count": (
        beside(called("torch.storage:_load_from_bytes", raw(stored()[:-20]))),
        "elements|too early",
    ),
    "a storage of a text": (beside(called("torch.storage:_load_from_bytes", text("a"))), "for byt"),
    "a zip as storage": (
        beside(called("torch.storage:_load_from_bytes", raw(b"PK\x03\x04" + bytes(99)))),
        "magic number",
    ),
    # Arrays.
    "an array of objects": (beside(array(kind=dtype("O8"))), "another type than numbers"),
    "an array of objects, pickled": (
        beside(array(contents=b"](" + called("os:system", text(COMMAND)) + b"e")),
        "asks to load",
    ),
    "an array whose bytes are a list": (beside(array(contents=b"]")), "list for bytes"),
    "an array of records": (beside(array(kind=dtype("V8"))), "another type than numbers"),
    "a type by another name": (beside(called("numpy:dtype", name("numpy:ndarray"))), "another"),
    "a type of a text": (beside(called("numpy:dtype", text("f4,O"))), "another type"),
    "an array larger than its bytes": (beside(array(shape=(2**60,))), "with 8 bytes"),
    "an array of overflowing shape": (beside(array(shape=(2**62, 4))), "with 8 bytes"),
    "an array of negative shape": (beside(array(shape=(-1, -2))), "with 8 bytes"),
    "an array of many dimensions": (beside(array(shape=(1,) * 99)), "state of an array"),
    "an array of a class": (
        beside(
            called("numpy.core.multiarray:_reconstruct", name("torch.nn.modules.linear:Linear"))
        ),
        "no numpy.ndarray",
    ),
    "an array without contents": (
        beside(array()[: array().index(b"R") + 1]),
        "PickledArray where data is expected",
    ),
    "a number of too many bytes": (
        beside(called("numpy.core.multiarray:scalar", dtype(), raw(bytes(8)))),
        "damaged pickle .a number",
    ),
    "a number that is an object": (
        beside(called("numpy.core.multiarray:scalar", dtype("O8"), text("a"))),
        "another type",
    ),
    # What holds itself, or grows.
    "a list in itself": (beside(b"]" + LAST + AGAIN + b"a"), "or in itself"),
    "a dict in itself": (beside(b"}" + LAST + text("a") + AGAIN + b"s"), "or in itself"),
    "a module in itself": (
        beside(
            b"ctorch.nn.modules.container\nSequential\n)\x81"
            + LAST
            + entries(_modules=entries(a=AGAIN))
            + b"b"
        ),
        "or in itself",
    ),
    "a persistent object in its arguments": (
        beside(persistent(b"}" + LAST + text("_init_kwargs") + AGAIN + b"s")),
        "or in itself",
    ),
    "tuples two hundred thousand deep": (beside(b")" + b"\x85" * 200_000), "nested more than"),
    "lists a hundred thousand deep": (beside(b"]" * 100_000 + b"a" * 99_999), "nested more than"),
    "dicts a hundred thousand deep": (
        beside((b"}" + text("a")) * 100_000 + b"N" + b"s" * 100_000),
        "nested more than",
    ),
    "modules ten thousand deep": (beside(deep_modules(10_000)), "nested more than"),
    "a billion lists": (shared(lambda x: [x] * 10, []), "more steps than"),
    "a billion modules": (
        shared(lambda x: torch.nn.ModuleDict({"a": x, "b": x}), torch.nn.Identity(), 22),
        "more steps than",
    ),
    "a billion copies of a text": (
        beside(b"](" + text("a" * 10**6) + LAST + AGAIN * 1000 + b"e"),
        "more data than",
    ),
    "a thousand tensors of one storage": (
        beside(
            b"]("
            + tensor(size=(10**5,), count=10**5, data=bytes(4 * 10**5))
            + LAST
            + (AGAIN * 1000 + b"e")
        ),
        "more data than",
    ),
    "one storage read a thousand times": (
        beside(
            b"("
            + raw(stored(count=10**5, data=bytes(4 * 10**5)))
            + LAST
            + (name("torch.storage:_load_from_bytes") + AGAIN + b"\x85R") * 1000
            + b"t"
        ),
        "more data than",
    ),
    "one text encoded a thousand times": (
        beside(
            b"("
            + text("a" * 10**6)
            + LAST
            + (name("_codecs:encode") + b"(" + AGAIN + text("latin1") + b"tR") * 1000
            + b"t"
        ),
        "more data than",
    ),
    "one list made a set a thousand times": (
        beside(
            b"(]("
            + text("a") * 10**5
            + b"e"
            + LAST
            + (name("builtins:set") + AGAIN + b"\x85R") * 1000
            + b"t"
        ),
        "more data than",
    ),
    # Lengths and numbers.
    "a text of 4 GB": (beside(b"X\xff\xff\xff\xffabc"), "ends too early"),
    "a text of 2^63 bytes": (beside(b"\x8d" + b"\xff" * 7 + b"\x7fabc"), "ends too early"),
    "a text of 2^64 - 1 bytes": (beside(b"\x8d" + b"\xff" * 8 + b"abc"), "ends too early"),
    "bytes of 2^63": (beside(b"\x8e" + b"\xff" * 7 + b"\x7fabc"), "ends too early"),
    "a byte string of negative length": (beside(b"T\xff\xff\xff\xffabc"), "ends too early"),
    "a frame beyond the end": (beside(b"\x95" + b"\xff" * 7 + b"\x7f"), "ends too early"),
    "an integer of a megabyte": (
        beside(b"\x8b" + struct.pack("<i", 1 << 20) + b"\xff" * (1 << 20)),
        "operation LONG4",
    ),
    "an integer of 255 bytes": (beside(b"\x8a\xff" + b"\xff" * 255), "integer of 255 bytes"),
    "an integer in a line": (beside(b"L" + b"9" * 10**6 + b"L\n"), "operation LONG"),
    "a name of a megabyte": (beside(b"c" + b"a" * 10**6 + b"\nb\n"), "ends too early"),
    "a long name in texts": (
        beside(text("a" * 10**6) + text("b") + b"\x93"),
        r"asks to load 'a+\.\.\.'",
    ),
    "a name with lines": (beside(text("a\nb") + text("c\x1b[2J") + b"\x93"), r"a\\nb\.c\\x1b"),
    "a name of lists": (beside(b"]]\x93"), "list for a text"),
    "a name beyond ASCII": (beside("cöß\nü\n".encode()), "damaged pickle"),
    "a text of broken UTF-8": (beside(b"X\x02\x00\x00\x00\xff\xff"), "damaged pickle"),
    "half a character": (beside(text("\ud800")), "damaged pickle"),
    "protocol 255": (b"\x80\xff" + beside(b"N")[2:], "protocol 255"),
    "a value never kept": (beside(b"j\xff\xff\xff\xff"), "no value 4294967295"),
    "a mark too few": (beside(b"t"), "damaged pickle"),
    "an empty stack": (b"\x80\x040.", "operation POP"),
    "nothing but an end": (b"\x80\x04.", "damaged pickle"),
    "keys without values": (beside(b"}(" + text("a") + b"u"), "damaged pickle"),
    "values added to a text": (beside(text("a") + b"Na"), "what is no list"),
    "entries set in a tensor": (beside(tensor() + text("a") + b"Ns"), "what is no dict"),
    "entries set in a module": (beside(persistent() + text("a") + b"Ns"), "what is no dict"),
    "members added to a list": (beside(b"](" + text("a") + b"\x90"), "what is no set"),
    "no operation": (beside(b"\xfe"), "no operation 0xfe"),
    "two snapshots": (beside(b"N") * 2, "bytes after its end"),
    "a second network that runs": (
        beside(b"N") + dumps({"ema": SYSTEM}),
        "bytes after its end",
    ),
}
for _path, _argument in PATHS.items():
    for _way, _spelled in (("", name), (" by texts", stacked)):
        HOSTILE[f"{_path} called{_way}"] = (
            beside(called(_path, text(_argument), spelled=_spelled)),
            "asks to load",
        )

# Every operation but those that data needs.
_ACCEPTED = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING BINPUT
    LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD EMPTY_TUPLE TUPLE
    TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS
"""
REFUSED = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}
REFUSED = {key: code for key, code in REFUSED.items() if key not in _ACCEPTED.split()}

# --- the watch --------------------------------------------------------------------------------

WATCHED = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pty.", "webbrowser.", "code.")
EVENTS = {
    "exec",
    "compile",
    "import",
    "open",
    "pickle.find_class",
    "marshal.loads",
    "urllib.Request",
}
_seen = None


def _hook(event, arguments):
    if _seen is not None and (event in EVENTS or event.startswith(WATCHED)):
        _seen.append((event, str(arguments)[:200]))


sys.addaudithook(_hook)


class Watch:
    """Lists what the interpreter was asked to do: run, import, open, start."""

    def __enter__(self):
        global _seen
        _seen = []
        return _seen

    def __exit__(self, *_):
        global _seen
        _seen = None


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Whatever is imported on first use is imported before a test watches."""
    path = tmp_path_factory.mktemp("warm") / "honest"
    read_snapshot(write_edm(path, edm_network()))
    for pack in (zipped, legacy):
        path.write_bytes(pack(weights(held())))
        read_state_dict(path)


@pytest.fixture
def folder(tmp_path, monkeypatch, warm):
    """A working directory, in which commands would leave a file "canary"."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(folder, data, reason, read=read_snapshot):
    path = folder / "net.pkl"
    path.write_bytes(data)
    before = set(sys.modules), set(vars(builtins))
    with Watch() as seen, pytest.raises(CheckpointError, match=reason) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path} is not ")
    assert len(message) < len(str(path)) + 400
    assert message.isprintable()
    assert not (folder / "canary").exists()
    assert [event for event in seen if event[0] != "open" or str(path) not in event[1]] == []
    assert (set(sys.modules), set(vars(builtins))) == before


# --- tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trick", HOSTILE)
def test_hostile_snapshots_are_refused_and_nothing_runs(folder, trick):
    refused(folder, *HOSTILE[trick])


@pytest.mark.parametrize("operation", REFUSED)
def test_operations_that_data_does_not_need_are_refused(folder, operation):
    refused(folder, beside(b"N" + REFUSED[operation] + bytes(20)), f"operation {operation}")


def test_what_the_tricks_are_made_of_is_honest():
    """Else they could be refused for another reason than the one they are there for."""
    for data in (
        beside(tensor()),
        beside(parameter(tensor())),
        beside(array()),
        beside(persistent()),
        beside(deep_modules(3)),
        network(_parameters=entries(a=tensor(), b=parameter(tensor()))),
    ):
        value, end = read(data)
        assert set(value) <= {"ema", "x"}
        assert end == len(data)


def read(data, **limits):
    spent = Limits(copies=2 * len(data), **limits)
    return read_pickle(memoryview(data), _snapshot_names(spent), spent)


@pytest.mark.parametrize(
    "trick",
    [
        "os.system as an entry, protocol 0",
        "os.system as an entry, protocol 4",
        "os.system as the network",
        "os.system deep in a list",
        "eval in the loss",
        "INST",
        "builtins:eval called",
        "builtins:exec called by texts",
        "os:system called",
        "EXT1",
        "EXT4",
    ],
)
def test_python_itself_would_have_run_them(folder, trick):
    """Else the tests above would show nothing."""
    data = HOSTILE[trick][0]
    copyreg.add_extension("os", "system", 0xF0)
    try:
        refused(folder, *HOSTILE[trick])
        with official_modules(), contextlib.suppress(Exception):
            persistence = sys.modules["torch_utils.persistence"]
            persistence._reconstruct_persistent_obj = lambda meta: None
            pickle.loads(data)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert (folder / "canary").exists()


def test_the_watch_sees_what_runs(folder):
    with Watch() as seen:
        eval("1")
        os.system("true")
    assert {event for event, _ in seen} >= {"exec", "compile", "os.system"}


def test_a_flood_of_operations_ends():
    for flood in (b"]\x94", b"}", b"\x8f\x94", b"(", b"N", b"h\x00"):
        data = b"\x80\x04N\x94" + flood * 5000
        with pytest.raises(RefusedPickle, match="more steps"):
            read(data, operations=3000)


@pytest.mark.parametrize("trick", [trick for trick in HOSTILE if "a thousand times" in trick])
def test_copies_are_bounded_while_they_are_made(trick):
    """Not only when all is read: the memory would be gone by then."""
    with pytest.raises(RefusedPickle, match="more data"):
        read(HOSTILE[trick][0])


# --- files of weights -------------------------------------------------------------------------


def zipped(pickled, record=bytes(16), count=4, **options):
    """A file of torch.save whose pickle is another."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(count)}, file)
    changed = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w", **options) as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl") and pickled is not None:
                data = pickled
            if info.filename.endswith("data/0"):
                data = record
            new.writestr(info.filename, data)
    return changed.getvalue()


def weights(value):
    """The pickle of a dict of one entry, without the tensors' numbers."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


def held(size=(4,), stride=(1,), offset=0, count=4, kind="torch:FloatStorage"):
    reference = (
        b"(" + text("storage") + name(kind) + text("0") + text("cpu") + number(count) + b"tQ"
    )
    sizes = numbers(size), numbers(stride)
    rebuilt = reference, number(offset), *sizes, b"\x89", NOTHING
    return called("torch._utils:_rebuild_tensor_v2", *rebuilt)


def legacy(pickled, record=bytes(16), count=4):
    head = stored()[:18] + b"\xe9\x03." + pickle.dumps(INFO, protocol=2)
    # Here a reference also tells of what the storage is a view.
    return (
        head
        + pickled.replace(b"tQ", b"NtQ")
        + pickle.dumps(["0"], protocol=2)
        + struct.pack("<q", count)
        + record
    )


WEIGHTS = {
    "os.system": (called("os:system", text(COMMAND)), "asks to load"),
    "eval": (called("builtins:eval", text(CODE)), "asks to load"),
    "torch.load": (called("torch:load", text("canary")), "asks to load"),
    "a gigabyte of zeros": (called("builtins:bytearray", number(1 << 40)), "asks to load"),
    "a tensor constructed": (called("torch:FloatTensor", number(1 << 40)), "asks to load"),
    "a device": (called("torch:device", text("cuda")), "asks to load"),
    "INST": (b"(" + text(COMMAND) + b"ios\nsystem\n", "as published: "),
    "EXT1": (b"\x82\xf0" + text(COMMAND) + b"\x85R", "as published: "),
    "a name by texts": (stacked("os:system") + text(COMMAND) + b"\x85R", "as published: "),
    "BUILD on a tensor": (held() + b"(" + number(3) + b"tb", "as published: "),
    "a storage called": (called("torch:FloatStorage", number(1 << 40)), "as published: "),
    "a tensor out of bounds": (held(size=(5,)), "as published: "),
    "a tensor of a terabyte": (held(size=(1 << 38,)), "as published: "),
    "an expanded tensor": (held(size=(1 << 38,), stride=(0,)), "outside its storage"),
    "a negative offset": (held(offset=-1), "as published: "),
    "a storage of a terabyte": (held(size=(1 << 38,), count=1 << 38), "as published: "),
    "a negative storage": (held(count=-4), "as published: "),
    "a list in itself": (b"]q\x00h\x00a", "no tensor|not found"),
    "tuples a hundred thousand deep": (b")" + b"\x85" * 100_000, "no tensor|not found"),
    "a text of 4 GB": (b"X\xff\xff\xff\xffabc", "as published: "),
    "no end": (b"}" * 10, "as published: "),
}


@pytest.mark.parametrize("pack", [zipped, legacy])
@pytest.mark.parametrize("trick", WEIGHTS)
def test_hostile_weights_are_refused_and_nothing_runs(folder, trick, pack):
    evil, reason = WEIGHTS[trick]
    path = folder / "a.pt"
    path.write_bytes(pack(weights(evil)))
    with Watch() as seen, pytest.raises(CheckpointError, match=reason) as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)
    assert not {event for event, _ in seen} & {"exec", "compile", "os.system", "subprocess.Popen"}


def test_what_the_hostile_weights_are_made_of_is_honest(tmp_path):
    for pack in (zipped, legacy):
        (tmp_path / "a.pt").write_bytes(pack(weights(held())))
        assert torch.equal(read_state_dict(tmp_path / "a.pt")["a"], torch.zeros(4))


def test_archives_that_unpack_to_more_than_they_are_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(zipped(None, bytes(1 << 24), 1 << 22, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="more contents than bytes"):
        read_state_dict(path)
    path.write_bytes(zipped(weights(b"N" * (5 << 20))))
    with pytest.raises(CheckpointError, match="bytes of names"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", b"c")
    with pytest.raises(CheckpointError, match=r"not an archive of torch\.save"):
        read_state_dict(path)
