"""Numbers of the SPIR-V specification that the code generator uses, under its own names.

Sources: SPIR-V 1.6 unified specification (section 3, "Binary Form"), the extended instruction set
GLSL.std.450, and Vulkan's ``VkSubgroupFeatureFlagBits``. Members keep the spelling of the
specification, without its ``Op`` prefix, so that a listing by ``spirv-dis`` reads like this code.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

MAGIC_NUMBER = 0x07230203
GENERATOR = 0
"""Generator word of the header: 0 is what tools without a registered number write."""

SPIRV_1_0, SPIRV_1_3, SPIRV_1_4, SPIRV_1_5, SPIRV_1_6 = 0x10000, 0x10300, 0x10400, 0x10500, 0x10600
GLSL_STD_450 = "GLSL.std.450"


class Op(IntEnum):
    """Opcodes."""

    Name = 5
    Extension = 10
    ExtInstImport = 11
    ExtInst = 12
    MemoryModel = 14
    EntryPoint = 15
    ExecutionMode = 16
    Capability = 17
    TypeVoid = 19
    TypeBool = 20
    TypeInt = 21
    TypeFloat = 22
    TypeVector = 23
    TypeArray = 28
    TypeRuntimeArray = 29
    TypeStruct = 30
    TypePointer = 32
    TypeFunction = 33
    ConstantTrue = 41
    ConstantFalse = 42
    Constant = 43
    Function = 54
    FunctionEnd = 56
    Variable = 59
    Load = 61
    Store = 62
    AccessChain = 65
    Decorate = 71
    MemberDecorate = 72
    CompositeConstruct = 80
    CompositeExtract = 81
    ConvertFToU = 109
    ConvertFToS = 110
    ConvertSToF = 111
    ConvertUToF = 112
    UConvert = 113
    SConvert = 114
    FConvert = 115
    Bitcast = 124
    SNegate = 126
    FNegate = 127
    IAdd = 128
    FAdd = 129
    ISub = 130
    FSub = 131
    IMul = 132
    FMul = 133
    UDiv = 134
    SDiv = 135
    FDiv = 136
    UMod = 137
    FRem = 140
    IsNan = 156
    IsInf = 157
    LogicalEqual = 164
    LogicalNotEqual = 165
    LogicalOr = 166
    LogicalAnd = 167
    LogicalNot = 168
    Select = 169
    IEqual = 170
    INotEqual = 171
    UGreaterThan = 172
    SGreaterThan = 173
    UGreaterThanEqual = 174
    SGreaterThanEqual = 175
    ULessThan = 176
    SLessThan = 177
    ULessThanEqual = 178
    SLessThanEqual = 179
    FOrdEqual = 180
    FUnordNotEqual = 183
    FOrdLessThan = 184
    FOrdGreaterThan = 186
    FOrdLessThanEqual = 188
    FOrdGreaterThanEqual = 190
    ShiftRightLogical = 194
    ShiftRightArithmetic = 195
    ShiftLeftLogical = 196
    BitwiseOr = 197
    BitwiseXor = 198
    BitwiseAnd = 199
    Not = 200
    BitCount = 205
    ControlBarrier = 224
    Phi = 245
    LoopMerge = 246
    SelectionMerge = 247
    Label = 248
    Branch = 249
    BranchConditional = 250
    Return = 253
    GroupNonUniformBroadcast = 337
    GroupNonUniformBroadcastFirst = 338
    GroupNonUniformShuffle = 345
    GroupNonUniformShuffleXor = 346
    GroupNonUniformShuffleUp = 347
    GroupNonUniformShuffleDown = 348
    GroupNonUniformIAdd = 349
    GroupNonUniformFAdd = 350
    GroupNonUniformSMin = 353
    GroupNonUniformUMin = 354
    GroupNonUniformFMin = 355
    GroupNonUniformSMax = 356
    GroupNonUniformUMax = 357
    GroupNonUniformFMax = 358
    SDot = 4450
    UDot = 4451
    SUDot = 4452
    TypeCooperativeMatrixKHR = 4456
    CooperativeMatrixLoadKHR = 4457
    CooperativeMatrixStoreKHR = 4458
    CooperativeMatrixMulAddKHR = 4459


class Glsl(IntEnum):
    """Instructions of the extended set GLSL.std.450."""

    RoundEven = 2
    Trunc = 3
    FAbs = 4
    Floor = 8
    Ceil = 9
    Sin = 13
    Cos = 14
    Tan = 15
    Asin = 16
    Acos = 17
    Atan = 18
    Sinh = 19
    Cosh = 20
    Tanh = 21
    Asinh = 22
    Acosh = 23
    Atanh = 24
    Atan2 = 25
    Pow = 26
    Exp = 27
    Log = 28
    Exp2 = 29
    Log2 = 30
    Sqrt = 31
    InverseSqrt = 32
    Fma = 50
    FindUMsb = 75


class Capability(IntEnum):
    """Capabilities a module declares; each needs a feature of the device."""

    Shader = 1
    Float16 = 9
    Float64 = 10
    Int64 = 11
    Int16 = 22
    Int8 = 39
    GroupNonUniform = 61
    GroupNonUniformArithmetic = 63
    GroupNonUniformBallot = 64
    GroupNonUniformShuffle = 65
    GroupNonUniformShuffleRelative = 66
    StorageBuffer16BitAccess = 4433
    StorageBuffer8BitAccess = 4448
    VulkanMemoryModel = 5345
    DotProductInput4x8BitPacked = 6018
    DotProduct = 6019
    CooperativeMatrixKHR = 6022


class Extension:
    """Names of SPIR-V extensions."""

    STORAGE_BUFFER = "SPV_KHR_storage_buffer_storage_class"
    STORAGE_8BIT = "SPV_KHR_8bit_storage"
    STORAGE_16BIT = "SPV_KHR_16bit_storage"
    INTEGER_DOT_PRODUCT = "SPV_KHR_integer_dot_product"
    VULKAN_MEMORY_MODEL = "SPV_KHR_vulkan_memory_model"
    COOPERATIVE_MATRIX = "SPV_KHR_cooperative_matrix"


class StorageClass(IntEnum):
    """Where a variable lives."""

    Input = 1
    Uniform = 2
    Workgroup = 4
    Function = 7
    PushConstant = 9
    StorageBuffer = 12


class Decoration(IntEnum):
    """Properties attached to ids and struct members."""

    Block = 2
    ArrayStride = 6
    Aliased = 20
    BuiltIn = 11
    Binding = 33
    DescriptorSet = 34
    Offset = 35


class BuiltIn(IntEnum):
    """Variables that the device fills in."""

    WorkgroupId = 26
    LocalInvocationId = 27
    SubgroupSize = 36
    NumSubgroups = 38
    SubgroupId = 40
    SubgroupLocalInvocationId = 41


class AddressingModel(IntEnum):
    """Addressing model of a module."""

    Logical = 0


class MemoryModel(IntEnum):
    """Memory model of a module."""

    GLSL450 = 1
    Vulkan = 3


class ExecutionModel(IntEnum):
    """Kind of an entry point."""

    GLCompute = 5


class ExecutionMode(IntEnum):
    """Modes of an entry point."""

    LocalSize = 17


class Scope(IntEnum):
    """Extent of a barrier or of a group operation."""

    Workgroup = 2
    Subgroup = 3


class MemorySemantics(IntFlag):
    """What a barrier orders."""

    AcquireRelease = 0x8
    UniformMemory = 0x40
    SubgroupMemory = 0x80
    WorkgroupMemory = 0x100
    MakeAvailable = 0x2000
    MakeVisible = 0x4000


class GroupOperation(IntEnum):
    """How a group operation combines its lanes."""

    Reduce = 0


class LoopControl(IntFlag):
    """Hints of a loop."""

    NoHint = 0
    Unroll = 1


class SelectionControl(IntFlag):
    """Hints of a selection."""

    NoHint = 0


class FunctionControl(IntFlag):
    """Hints of a function."""

    NoHint = 0


class MemoryAccess(IntFlag):
    """Modes of a load or store."""

    Volatile = 1
    NonPrivatePointer = 0x20


class PackedVectorFormat(IntEnum):
    """How a dot product reads a 32-bit word as a vector."""

    PackedVectorFormat4x8Bit = 0


class CooperativeMatrixUse(IntEnum):
    """What a cooperative matrix is in a product A B + C."""

    MatrixA = 0
    MatrixB = 1
    MatrixAccumulator = 2


class CooperativeMatrixLayout(IntEnum):
    """How a cooperative matrix lies in memory."""

    RowMajor = 0
    ColumnMajor = 1


class SubgroupFeature(IntFlag):
    """Vulkan's ``VkSubgroupFeatureFlagBits``, the target's ``supported_subgroup_operations``."""

    Basic = 0x1
    Vote = 0x2
    Arithmetic = 0x4
    Ballot = 0x8
    Shuffle = 0x10
    ShuffleRelative = 0x20
