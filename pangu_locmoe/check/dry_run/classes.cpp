// The classes of CANN's graph engine (namespace ge) that must keep what they are given: MindSpore's
// Ascend plugin fills their objects while it is loaded, and reads them back. All else of CANN is a
// function that does nothing (libraries.py).
//
// Names and sizes are those of CANN's headers: an object holds one shared pointer, an operator a
// table of virtual functions before it. Compile with -D_GLIBCXX_USE_CXX11_ABI=0, as CANN is.

#include <any>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// A function inside of a class is inline, and left out where nothing here calls it. These must be there.
#define KEEP __attribute__((used, visibility("default")))

using Bytes = std::vector<uint8_t>;
using Numbers = std::vector<int64_t>;
using Result = uint32_t;

namespace ge {
constexpr Result kGood = 0;
constexpr Result kBad = 1;

enum DataType : int {};
enum Format : int {};

// Texts of error numbers. The caller is inline code of CANN's headers, which looks into a map.
struct StatusFactory {
  KEEP static StatusFactory *Instance() {
    static auto *texts = new std::map<uint32_t, std::string>;
    return reinterpret_cast<StatusFactory *>(texts);
  }
};

class AscendString {
 public:
  AscendString() = default;
  KEEP AscendString(const char *text) : text_(std::make_shared<std::string>(text ? text : "")) {}
  KEEP const char *GetString() const { return text_ ? text_->c_str() : ""; }
  KEEP bool operator<(const AscendString &other) const {
    return std::string(GetString()) < other.GetString();
  }

 private:
  std::shared_ptr<std::string> text_;
};

class Shape {
 public:
  KEEP Shape() : Shape(Numbers()) {}
  KEEP Shape(const Numbers &sizes) : sizes_(std::make_shared<Numbers>(sizes)) {}
  KEEP size_t GetDimNum() const { return sizes_ ? sizes_->size() : 0; }
  KEEP int64_t GetDim(size_t axis) const { return axis < GetDimNum() ? sizes_->at(axis) : 0; }
  KEEP Numbers GetDims() const { return sizes_ ? *sizes_ : Numbers(); }
  KEEP Result SetDim(size_t axis, int64_t size) {
    if (axis >= GetDimNum()) {
      return kBad;
    }
    sizes_->at(axis) = size;
    return kGood;
  }
  KEEP int64_t GetShapeSize() const {
    int64_t product = 1;
    for (int64_t size : GetDims()) {
      product *= size;
    }
    return product;
  }

 private:
  std::shared_ptr<Numbers> sizes_;
};

class TensorDesc {
 public:
  KEEP TensorDesc() : kept_(std::make_shared<Kept>()) {}
  KEEP TensorDesc(Shape shape, Format format, DataType type) : TensorDesc() {
    kept_->shape = shape;
    kept_->format = format;
    kept_->type = type;
  }
  KEEP TensorDesc(const TensorDesc &other) : kept_(std::make_shared<Kept>(*other.kept_)) {}
  KEEP TensorDesc(TensorDesc &&other) : kept_(std::move(other.kept_)) {}
  TensorDesc &operator=(const TensorDesc &) = default;

  KEEP Shape GetShape() const { return kept_->shape; }
  KEEP Shape GetOriginShape() const { return kept_->origin; }
  KEEP Format GetFormat() const { return kept_->format; }
  KEEP DataType GetDataType() const { return kept_->type; }
  KEEP void SetShape(const Shape &shape) { kept_->shape = shape; }
  KEEP void SetOriginShape(const Shape &shape) { kept_->origin = shape; }
  KEEP void SetFormat(Format format) { kept_->format = format; }
  KEEP void SetOriginFormat(Format) {}
  KEEP void SetDataType(DataType type) { kept_->type = type; }

 private:
  struct Kept {
    Shape shape;
    Shape origin;
    Format format{};
    DataType type{};
  };
  std::shared_ptr<Kept> kept_;
};

class Tensor {
 public:
  KEEP Tensor() : kept_(std::make_shared<Kept>()) {}
  KEEP explicit Tensor(const TensorDesc &desc) : Tensor() { kept_->desc = desc; }
  KEEP Tensor(const TensorDesc &desc, const uint8_t *data, size_t size) : Tensor(desc) {
    SetData(data, size);
  }
  KEEP TensorDesc GetTensorDesc() const { return kept_->desc; }
  KEEP Result SetTensorDesc(const TensorDesc &desc) {
    kept_->desc = desc;
    return kGood;
  }
  KEEP size_t GetSize() const { return kept_->data.size(); }
  KEEP uint8_t *GetData() { return kept_->data.data(); }
  KEEP Result SetData(const uint8_t *data, size_t size) {
    kept_->data = data ? Bytes(data, data + size) : Bytes();
    return kGood;
  }

 private:
  struct Kept {
    TensorDesc desc;
    Bytes data;
  };
  std::shared_ptr<Kept> kept_;
};

struct TensorType {
  KEEP TensorType(const std::initializer_list<DataType> &) {}
  std::shared_ptr<int> unused;
};

struct Promote {
  KEEP Promote(const std::initializer_list<const char *> &) {}
  std::shared_ptr<int> unused;
};

class Operator {
 public:
  virtual ~Operator() = default;
  KEEP Operator(const char *type) : Operator("", type) {}
  KEEP Operator(const char *name, const char *type) : kept_(std::make_shared<Kept>()) {
    kept_->name = name;
    kept_->type = type;
  }
  KEEP Operator(const AscendString &name, const AscendString &type)
      : Operator(name.GetString(), type.GetString()) {}
  KEEP Operator(const std::string &type) : Operator(type.c_str()) {}
  KEEP Operator(const std::string &name, const std::string &type)
      : Operator(name.c_str(), type.c_str()) {}

  KEEP std::string GetName() const { return kept_ ? kept_->name : ""; }
  KEEP std::string GetOpType() const { return kept_ ? kept_->type : ""; }
  KEEP Result GetName(AscendString &name) const {
    name = AscendString(GetName().c_str());
    return kGood;
  }
  KEEP Result GetOpType(AscendString &type) const {
    type = AscendString(GetOpType().c_str());
    return kGood;
  }

  // What an attribute is registered with is its default.
#define REGISTERED(ARGUMENT, KEPT) \
  KEEP void AttrRegister(const char *name, ARGUMENT value) { Set<KEPT>(name, value); }
  REGISTERED(bool, bool)
  REGISTERED(float, float)
  REGISTERED(int64_t, int64_t)
  REGISTERED(const DataType &, DataType)
  REGISTERED(const Tensor &, Tensor)
  REGISTERED(const std::vector<float> &, std::vector<float>)
  REGISTERED(const Numbers &, Numbers)
  REGISTERED(const std::vector<DataType> &, std::vector<DataType>)
  REGISTERED(const std::vector<Numbers> &, std::vector<Numbers>)
#undef REGISTERED
  KEEP void AttrRegister(const char *name, const AscendString &value) {
    Set<std::string>(name, value.GetString());
  }
  KEEP void AttrRegister(const char *name, const std::vector<AscendString> &values) {
    std::vector<std::string> texts;
    for (const auto &value : values) {
      texts.push_back(value.GetString());
    }
    Set(name, texts);
  }

  // Names come as char pointers and, from older code, as strings.
#define SETTER(NAME, ARGUMENT, KEPT) \
  KEEP Operator &SetAttr(NAME name, ARGUMENT value) { return Set<KEPT>(name, value); }
#define SETTERS(ARGUMENT, KEPT)         \
  SETTER(const char *, ARGUMENT, KEPT) \
  SETTER(const std::string &, ARGUMENT, KEPT)
  SETTERS(bool, bool)
  SETTERS(float, float)
  SETTERS(int32_t, int32_t)
  SETTERS(int64_t, int64_t)
  SETTERS(const std::vector<float> &, std::vector<float>)
  SETTERS(const std::vector<int32_t> &, std::vector<int32_t>)
  SETTERS(const Numbers &, Numbers)
  SETTER(const char *, uint32_t, int64_t)
  SETTER(const char *, const char *, std::string)
  SETTER(const char *, const DataType &, DataType)
  SETTER(const char *, const Tensor &, Tensor)
  SETTER(const char *, const std::vector<DataType> &, std::vector<DataType>)
  SETTER(const char *, const std::vector<Numbers> &, std::vector<Numbers>)
  SETTER(const std::string &, const std::string &, std::string)
  SETTER(const std::string &, const std::vector<bool> &, std::vector<bool>)
  SETTER(const std::string &, const std::vector<std::string> &, std::vector<std::string>)
#undef SETTERS
#undef SETTER

#define GETTER(NAME, KEPT) \
  KEEP Result GetAttr(NAME name, KEPT &value) const { return Get(name, value); }
  GETTER(const char *, bool)
  GETTER(const char *, float)
  GETTER(const char *, DataType)
  GETTER(const char *, Tensor)
  GETTER(const char *, std::vector<float>)
  GETTER(const char *, std::vector<DataType>)
  GETTER(const char *, std::vector<Numbers>)
  GETTER(const std::string &, std::string)
  GETTER(const std::string &, std::vector<std::string>)
#undef GETTER
  // Integers are asked for in either width, whichever they came in.
#define INTEGERS(KEPT, OTHER)                                        \
  KEEP Result GetAttr(const char *name, KEPT &value) const {         \
    return Get(name, value) == kGood ? kGood : GetFrom<OTHER>(name, value); \
  }
  INTEGERS(int32_t, int64_t)
  INTEGERS(int64_t, int32_t)
  INTEGERS(std::vector<int32_t>, Numbers)
  INTEGERS(Numbers, std::vector<int32_t>)
#undef INTEGERS

  // Edges are not kept: operators are launched one by one, and no graph is handed to CANN.
#define EDGE(...) \
  KEEP Operator &__VA_ARGS__ { return *this; }
  EDGE(SetInput(const char *, const Operator &))
  EDGE(SetInput(const char *, uint32_t, const Operator &))
  EDGE(SetInput(const char *, uint32_t, const Operator &, const char *))
  EDGE(SetInput(const std::string &, const Operator &))
  EDGE(SetInput(const std::string &, const Operator &, const std::string &))
  EDGE(AddControlInput(const Operator &))
#undef EDGE
  KEEP TensorDesc GetOutputDesc(uint32_t) const { return {}; }
  KEEP TensorDesc GetOutputDesc(const std::string &) const { return {}; }

 private:
  struct Kept {
    std::string name;
    std::string type;
    std::map<std::string, std::any> attributes;
  };

  template <class T>
  Operator &Set(const std::string &name, const T &value) {
    if (kept_) {
      kept_->attributes[name] = value;
    }
    return *this;
  }

  template <class T>
  Result Get(const std::string &name, T &value) const {
    if (!kept_ || kept_->attributes.count(name) == 0) {
      return kBad;
    }
    const T *found = std::any_cast<T>(&kept_->attributes.at(name));
    if (found == nullptr) {
      return kBad;
    }
    value = *found;
    return kGood;
  }

  template <class Other, class T>
  Result GetFrom(const std::string &name, T &value) const {
    Other other{};
    if (Get(name, other) == kBad) {
      return kBad;
    }
    if constexpr (std::is_integral_v<T>) {
      value = static_cast<T>(other);
    } else {
      value.assign(other.begin(), other.end());
    }
    return kGood;
  }

  std::shared_ptr<Kept> kept_;
};

// As far as this goes, CANN has every operator.
struct OperatorFactory {
  KEEP static bool IsExistOp(const char *) { return true; }
  KEEP static bool IsExistOp(const std::string &) { return true; }
  KEEP static Operator CreateOperator(const char *name, const char *type) {
    return Operator(name, type);
  }
  KEEP static Operator CreateOperator(const std::string &name, const std::string &type) {
    return Operator(name, type);
  }
};
}  // namespace ge
